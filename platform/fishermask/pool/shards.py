"""The interface of the shards of a pool, and shards in this process.

Callers pass a method of the class ``Shard``, as in ``shards.call(Shard.embeddings_at, positions)``, so that type
checkers can check the arguments and the result.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar, TypeVarTuple

import torch
from torch import Tensor

from fishermask.pool.blocks import shard_slices
from fishermask.pool.shard import Shard
from fishermask.tensors.images import Images, Preprocess

Result = TypeVar("Result")
Args = TypeVarTuple("Args")


class Shards(Protocol):
    """The shards of one pool, in the order of their slices."""

    count: int
    num_rebuilt: int
    """Number of shards that were lost and rebuilt."""

    def call(self, method: Callable[[Shard, *Args], Result], *args: *Args) -> list[Result]:
        """Call ``method`` on every shard with the same arguments. Return the results in order."""

    def scatter(self, method: Callable[[Shard, *Args], Result], args: Sequence[tuple[*Args]]) -> list[Result]:
        """Call ``method`` on the first ``len(args)`` shards, with one element of ``args`` each."""

    def sum_results(self, method: Callable[[Shard, *Args], tuple[Tensor, ...]], *args: *Args) -> list[Tensor]:
        """Call ``method`` on every shard. Return the sum over the shards for each tensor that it returns.

        Shards without images return empty tensors, which are skipped.
        """

    def close(self) -> None:
        """End the shards and free their memory."""


def sum_rows(rows: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Return the sum of ``rows``, tensor by tensor; overwrite the first row, and skip rows of empty tensors."""
    totals: list[Tensor] = []
    for row in rows:
        if len(row[0]) and totals:
            for total, part in zip(totals, row, strict=True):
                total += part
        elif len(row[0]):
            totals = list(row)
    return totals


class LocalShards:
    """Shards in this process, with one thread each.

    Args:
        images: the whole pool, [n, ...]; no shard copies its slice.
        preprocess: function from images to inputs of the model.
    """

    def __init__(self, images: Images, preprocess: Preprocess, count: int = 1, device: str = "cpu") -> None:
        self.count, self.num_rebuilt = count, 0
        self.shards = [
            Shard(images.narrow(0, start, end - start), start, preprocess, device)
            for start, end in shard_slices(len(images), count)
        ]
        # ``torch.set_num_threads`` changes only the thread that calls it, and so not the thread of the caller.
        self.threads = ThreadPoolExecutor(count, "shard", torch.set_num_threads, (1,))

    def call(self, method: Callable[[Shard, *Args], Result], *args: *Args) -> list[Result]:
        return self.scatter(method, [args] * self.count)

    def scatter(self, method: Callable[[Shard, *Args], Result], args: Sequence[tuple[*Args]]) -> list[Result]:
        calls = [
            self.threads.submit(method, shard, *shard_args)
            for shard, shard_args in zip(self.shards, args, strict=False)
        ]
        return [call.result() for call in calls]

    def sum_results(self, method: Callable[[Shard, *Args], tuple[Tensor, ...]], *args: *Args) -> list[Tensor]:
        return sum_rows(self.call(method, *args))

    def close(self) -> None:
        self.threads.shutdown()
        self.shards = []

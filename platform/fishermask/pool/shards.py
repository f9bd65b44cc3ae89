"""Calling all shards of a pool: what the greedy loop needs, and its simplest kind, shards in this process."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from fishermask.pool.blocks import shard_slices
from fishermask.pool.shard import Shard
from fishermask.tensors.images import Images, Preprocess


class Shards(Protocol):
    """The shards of one pool, in the order of their slices."""

    count: int
    rebuilt: int
    """How many were lost and made again."""

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call ``method`` on every shard with the same arguments; the results in order."""

    def scatter(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call ``method`` on the first ``len(args)`` shards, each with its own arguments; the results in order."""

    def total(self, method: str, *args: Any) -> list[Tensor]:
        """Sums over all shards of the tensors that ``method`` returns; shards without images return empty ones."""

    def close(self) -> None:
        """Free what the shards hold."""


def summed(found: Iterator[Sequence[Tensor]]) -> list[Tensor]:
    """Element by element, the sums of several rows of tensors, in place of the first; empty tensors do not count."""
    totals: list[Tensor] = []
    for row in found:
        if len(row[0]) and totals:
            for total, part in zip(totals, row, strict=True):
                total += part
        elif len(row[0]):
            totals = list(row)
    return totals


class LocalShards:
    """Shards that live in this process, each on a thread of its own.

    Args:
        images: the whole pool, [n, ...]; no shard copies its share.
        preprocess: makes the model's inputs from images.
    """

    def __init__(self, images: Images, preprocess: Preprocess, count: int = 1, device: str = "cpu") -> None:
        self.count, self.rebuilt = count, 0
        self.shards = [
            Shard(images.narrow(0, start, end - start), start, preprocess, device)
            for start, end in shard_slices(len(images), count)
        ]
        # The number of threads that torch computes with is kept by thread: the caller's own stays as it is.
        self.threads = ThreadPoolExecutor(count, "shard", torch.set_num_threads, (1,))

    def call(self, method: str, *args: Any) -> list[Any]:
        return self.scatter(method, [args] * self.count)

    def scatter(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        calls = [
            self.threads.submit(getattr(shard, method), *own) for shard, own in zip(self.shards, args, strict=False)
        ]
        return [call.result() for call in calls]

    def total(self, method: str, *args: Any) -> list[Tensor]:
        return summed(iter(self.call(method, *args)))

    def close(self) -> None:
        self.threads.shutdown()
        self.shards = []

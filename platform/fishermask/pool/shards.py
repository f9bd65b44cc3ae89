"""Calling all shards of a pool: what the greedy loop needs, and its simplest kind, shards in this process."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from fishermask.pool.shard import Shard, cut
from fishermask.tensors.images import Statistics


class Shards(Protocol):
    """The shards of one pool, in the order of their slices."""

    count: int

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call ``method`` on every shard with the same arguments; the results in order."""

    def scatter(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call ``method`` on the first ``len(args)`` shards, each with its own arguments; the results in order."""

    def close(self) -> None:
        """Free what the shards hold."""


class LocalShards:
    """Shards that live in this process, one after the other: for one machine, for tests and for a debugger.

    Args:
        images: the whole pool, uint8 [n, channels, height, width].
    """

    def __init__(self, images: Tensor, statistics: Statistics, count: int = 1, device: str = "cpu") -> None:
        self.count = count
        pixels = images.numpy()
        self.shards = [
            Shard(pixels[start:end], start, statistics, device, None) for start, end in cut(len(images), count)
        ]

    def call(self, method: str, *args: Any) -> list[Any]:
        return [getattr(shard, method)(*args) for shard in self.shards]

    def scatter(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [getattr(shard, method)(*own) for shard, own in zip(self.shards, args, strict=False)]

    def close(self) -> None:
        self.shards = []

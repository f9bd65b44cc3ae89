"""Shards as Ray actors: children of whichever process makes them, inside its placement group if it has one."""

from collections.abc import Sequence
from typing import Any

import ray
import torch

from fishermask.pool.shard import Shard, cut
from fishermask.tensors.images import Images, Statistics

START_TIMEOUT = 300
"""Seconds until an actor that was never placed is given up: a pending actor raises no error by itself."""


# The coordinator must know of a lost shard: a restarted actor would be empty, and would answer all the same.
@ray.remote(max_restarts=0, max_task_retries=0)
class ShardActor(Shard):
    def __init__(self, images: Images, start: int, statistics: Statistics, device: str) -> None:
        torch.set_num_threads(1)
        super().__init__(images, start, statistics, device)


class RayShards:
    """``count`` actors, each with ``cpus`` and ``gpus`` (fractions allowed) of its own.

    Args:
        images: the whole pool. An actor gets a view of its share, which travels as row numbers; it maps the pixels on
            its own machine, or reads them from their source there.
    """

    def __init__(self, images: Images, statistics: Statistics, count: int, cpus: float, gpus: float) -> None:
        self.count = count
        device = "cuda" if gpus else "cpu"
        options = ShardActor.options(num_cpus=cpus, num_gpus=gpus)  # type: ignore[attr-defined]
        self.actors = [
            options.remote(images.narrow(0, start, end - start), start, statistics, device)
            for start, end in cut(len(images), count)
        ]
        ray.get([actor.clear.remote() for actor in self.actors], timeout=START_TIMEOUT)

    def call(self, method: str, *args: Any) -> list[Any]:
        shared = [ray.put(arg) for arg in args]  # once a node, not once a shard
        return ray.get([getattr(actor, method).remote(*shared) for actor in self.actors])

    def scatter(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        return ray.get([getattr(actor, method).remote(*own) for actor, own in zip(self.actors, args, strict=False)])

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

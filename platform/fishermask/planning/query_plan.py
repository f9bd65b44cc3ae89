"""The execution plan of a run's queries: chunks that fit into memory, or a refusal that says what to change."""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from fishermask.errors import InputError
from fishermask.planning.duration import query_seconds
from fishermask.planning.measurement import Measurement
from fishermask.planning.memory import Estimate, Task, estimate_memory, format_bytes
from fishermask.pool.blocks import BLOCK, CHUNKS, shard_slices

MEMORY_SHARE = 0.9
"""Share of a machine's free memory that runs may use."""
PROCESS_BYTES = 0.5e9
"""What a process takes by itself: Python, PyTorch and Ray. Private memory of a trial that trains ``mlp``: 480 MB; of a
Ray shard before it gets a model: 400 MB; torch 2.14 built for CUDA, no GPU."""
SECONDS_PER_SHARD = 10.0
"""Work of a query on one core that is worth a shard of its own ..."""
IMAGES_PER_SHARD = 20_000
"""... and as many images, where a query computes nothing."""


@dataclass(frozen=True)
class QueryPlan:
    """The execution plan of a run's queries, and what the run's processes need."""

    num_shards: int
    chunk: int
    """Images differentiated at once."""
    diagonal_batch: int
    """Images whose Fisher diagonal is computed at once."""
    coordinator: Estimate
    """Of the process that trains and leads the selection, including in-process shards."""
    shard: Estimate | None
    """Of each shard that has a process of its own."""
    seconds: float
    """About how long a query takes, if each shard has a core such as this one, and no GPU."""
    main_bytes: float
    """Main memory of the coordinator: all of its estimate, or where shards are on GPUs what is not on them."""
    shard_main_bytes: float = 0.0
    """Main memory of each shard that has a process of its own."""
    gpu: bool = False
    """Whether shards are on GPUs."""

    @property
    def largest_bytes(self) -> float:
        """Bytes of the largest process."""
        return max(self.coordinator.total, 0.0 if self.shard is None else self.shard.total)

    def __str__(self) -> str:
        shards = "1 shard" if self.num_shards == 1 else f"{self.num_shards} shards"
        time = f"about {format_seconds(self.seconds)} per query" if self.seconds else "no computation per query"
        memory = f"peak memory {self.coordinator}"
        memory += "" if self.shard is None else f", and {self.shard} in each shard"
        return f"{time}{' (without GPUs)' if self.gpu else ''}, {shards}, {memory}"


def format_seconds(seconds: float) -> str:
    """Return ``0.05 s``, ``7 s`` or ``3 min``."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 90:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1g} s"


def free_memory(gpu: bool) -> float:
    """Return the bytes that this process could still use: of the GPU, else of the machine or its container.

    Page cache that the system can reclaim counts as free.
    """
    if gpu and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    return min(float(psutil.virtual_memory().available), container_memory(Path("/sys/fs/cgroup")))


def container_memory(cgroup: Path) -> float:
    """Return the free bytes of the container whose control group is at ``cgroup``; infinity without a limit."""
    limit, used, statistics = (cgroup / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not limit.exists() or (text := limit.read_text().strip()) == "max":
        return math.inf
    lines = dict(line.split() for line in statistics.read_text().splitlines())
    return float(text) - float(used.read_text()) + float(lines.get("inactive_file", 0))


def plan_query(
    measured: Measurement,
    task: Task,
    num_shards: int = 1,
    *,
    in_process: bool = True,
    gpu: bool = False,
    limit: float = math.inf,
    shard_limit: float = math.inf,
) -> QueryPlan:
    """Plan the queries of ``task``.

    Args:
        in_process: whether the shards are in the coordinator's process.
        gpu: whether the shards are on GPUs.
        limit: bytes that the coordinator may use.
        shard_limit: bytes that each shard with a process of its own may use.

    Raises:
        InputError: the task cannot fit; the message names what takes the most, and the largest setting that fits.
    """
    sizes = [end - start for start, end in shard_slices(task.pool_size, num_shards)]
    images, occupied = max(sizes), sum(size > 0 for size in sizes)
    seconds = query_seconds(measured, images, task.pool_size, task.query_size, task.num_labeled)
    if in_process:
        even = -(-task.pool_size // occupied)
        chunk, whole = _fit(measured, task, limit, images=even, shards=occupied)
        main = _fit(measured, replace(task, training_batch=0), limit, images=0, shards=0)[1] if gpu else whole
        return QueryPlan(num_shards, chunk, measured.diagonal_batch, whole, None, seconds, main.total, gpu=gpu)
    chunk, shard = _fit(measured, task, shard_limit, images=images, coordinates=False)
    _, coordinator = _fit(measured, task, limit, (chunk,), images=0, shards=0)
    shard_main = estimate_memory(measured, task, chunk, images=0, coordinates=False) if gpu else shard
    return QueryPlan(
        num_shards,
        chunk,
        measured.diagonal_batch,
        coordinator,
        shard,
        seconds,
        coordinator.total,
        shard_main.total,
        gpu,
    )


def wanted_shards(measured: Measurement, task: Task, in_process: bool, shard_limit: float = math.inf) -> int:
    """Return as many shards as give each some seconds of work and fit, each, into its memory."""
    if measured.work is None:
        return math.ceil(task.pool_size / IMAGES_PER_SHARD)
    blocks = math.ceil(task.pool_size / BLOCK)  # more shards would be empty
    count = min(math.ceil(plan_query(measured, task).seconds / SECONDS_PER_SHARD), blocks)

    def largest_bytes(count: int) -> float:
        return plan_query(measured, task, count, in_process=False).largest_bytes

    while not in_process and count < blocks and largest_bytes(count) > shard_limit:
        count = min(blocks, 2 * count)
    return max(1, count)


def _fit(
    measured: Measurement,
    task: Task,
    limit: float,
    chunks: tuple[int, ...] = CHUNKS,
    *,
    images: int,
    shards: int = 1,
    coordinates: bool = True,
) -> tuple[int, Estimate]:
    """Return the largest chunk with which the process needs no more than ``limit`` bytes, and its estimate."""

    def needed(chunk: int, measured: Measurement = measured, task: Task = task) -> Estimate:
        return estimate_memory(measured, task, chunk, images, shards, coordinates)

    for chunk in chunks:
        if (found := needed(chunk)).total <= limit:
            return chunk, found

    def largest(upper: int, total: Callable[[int], float]) -> int:
        """Return the largest value below ``upper`` whose total fits; -1 if not even 0 does."""
        value = bisect.bisect_right(range(upper), limit, key=total) - 1
        while value >= 0 and total(value) > limit:  # totals fall where parts become narrower
            value = value * 9 // 10 if value else -1
        return value

    smallest, work = needed(chunks[-1]), measured.work
    remedy = {
        "evaluate": "choose a smaller model or smaller images",
        "predict": "choose a smaller model, or fewer resources.shards in one process",
    }.get(smallest.stage, "set engine.storage to bfloat16, use fewer classes (top_classes), or choose a smaller model")
    if smallest.stage == "train":
        batch = largest(
            task.training_batch, lambda size: needed(chunks[-1], task=replace(task, training_batch=size)).total
        )
        remedy = f"lower training.batch_size to {batch}" if batch > 0 else "choose a smaller model"
    elif work is not None and work.body_size:
        body = largest(work.body_size, lambda size: needed(chunks[-1], measured.with_body_size(size)).total)
        if body >= 0:
            remedy = (
                f"lower strategy.params.num_body_parameters to {body:,}"
                if body
                else "set strategy.params.mask to last_layer"
            )
    raise InputError(
        f"resources.memory: the process that is to {smallest.stage} needs {smallest}, more than the "
        f"{format_bytes(limit)} available; {remedy}"
    )

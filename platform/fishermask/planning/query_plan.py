"""The execution plan of the queries of a run: a chunk size that fits into memory, or an error with a remedy."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fishermask.errors import InputError
from fishermask.guard import plural
from fishermask.planning.estimates import (
    PROCESS_BYTES,
    Estimate,
    QueryRequest,
    estimate_memory,
    estimate_seconds,
    format_bytes,
)
from fishermask.planning.workload import Measurement
from fishermask.pool.blocks import BLOCK, CHUNKS, shard_slices

SHARD_SECONDS, SHARD_IMAGES = 10.0, 20_000
"""Work per shard that makes another shard useful: seconds of a query on one core, or images if it computes nothing."""

Process = Callable[[Measurement, QueryRequest, int], Estimate]
"""Function that estimates the memory of a process for a chunk size."""


@dataclass(frozen=True)
class QueryPlan:
    """The execution plan of the queries of a run, and the memory of its processes."""

    num_shards: int
    chunk: int
    """Number of images whose gradients are computed at once."""
    diagonal_batch: int
    """Number of images whose Fisher diagonal is computed at once."""
    seconds: float
    """Seconds of a query if each shard has one core of the speed of this machine, and no GPU."""
    coordinator: Estimate
    """Main memory of the coordinator, including the shards in its process."""
    shard: Estimate | None = None
    """Main memory of each Ray shard."""
    gpu: Estimate | None = None
    """GPU memory of each process that holds shards."""

    @property
    def largest_bytes(self) -> float:
        """Memory of the largest process."""
        return max(estimate.total for estimate in (self.coordinator, self.shard, self.gpu) if estimate)

    def __str__(self) -> str:
        time = f"about {format_seconds(self.seconds)} per query" if self.seconds else "no computation per query"
        shards = plural(self.num_shards, "shard")
        text = f"{time}{' without GPUs' if self.gpu else ''}, peak memory {self.coordinator}"
        base = f"beyond Python's {PROCESS_BYTES / 1e9:g} GB"
        text += f", {shards} of {self.shard}, each {base}" if self.shard else f" {base}, {shards}"
        return f"{text}, GPU memory {self.gpu}" if self.gpu else text


def format_seconds(seconds: float) -> str:
    """Return ``0.05 s``, ``7 s``, ``3 min`` or ``2.5 h``."""
    if seconds >= 90:
        return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1g} s"


def plan_query(
    measured: Measurement,
    request: QueryRequest,
    num_shards: int = 1,
    *,
    in_process: bool = True,
    limit: float = math.inf,
    gpu_limit: float | None = None,
) -> QueryPlan:
    """Plan the queries of a run.

    Args:
        in_process: whether the coordinator holds all shards; otherwise each shard has its own process.
        limit: bytes of main memory that each process may use.
        gpu_limit: bytes of GPU memory that each process with shards may use; None without GPUs.

    Raises:
        InputError: a process does not fit into its memory; the message names a setting and a value that fits.
    """
    sizes = [end - start for start, end in shard_slices(request.pool_size, num_shards)]
    occupied = sum(size > 0 for size in sizes)
    shard_process = partial(estimate_memory, num_images=max(sizes), coordinates=False)
    if in_process:
        shard_process = partial(estimate_memory, num_images=-(-request.pool_size // occupied), num_shards=occupied)
    chunk, memory = _fit(shard_process, measured, request, limit if gpu_limit is None else gpu_limit)
    seconds = estimate_seconds(measured, request, max(sizes))
    plan = QueryPlan(num_shards, chunk, measured.diagonal_batch, seconds, memory)
    if in_process and gpu_limit is None:
        return plan
    # The main memory of the coordinator holds no shard. If the shards are on its GPU, training is there too.
    coordinator_request = replace(request, training_batch_size=0) if in_process else request
    coordinator = _fit(partial(estimate_memory, num_images=0, num_shards=0), measured, coordinator_request, limit)[1]
    if gpu_limit is None:
        return replace(plan, coordinator=coordinator, shard=memory)
    shard = None if in_process else shard_process(measured, request, chunk, num_images=0)
    return replace(plan, coordinator=coordinator, shard=shard, gpu=memory)


def useful_shards(
    measured: Measurement, request: QueryRequest, *, in_process: bool, limit: float, gpu_limit: float | None = None
) -> int:
    """Return the number of shards that gives each about ``SHARD_SECONDS`` of work, and fits into memory."""
    if not measured.work.uses_model:
        return math.ceil(request.pool_size / SHARD_IMAGES)
    blocks = math.ceil(request.pool_size / BLOCK)  # more shards would be empty
    seconds = estimate_seconds(measured, request, request.pool_size)
    count = max(1, min(blocks, math.ceil(seconds / SHARD_SECONDS)))
    # Fewer shards in one process take less memory; more processes with a shard each take less memory each.
    last = 1 if in_process else blocks
    while count != last:
        try:
            plan_query(measured, request, count, in_process=in_process, limit=limit, gpu_limit=gpu_limit)
            break
        except InputError:
            count = count // 2 if in_process else min(blocks, 2 * count)
    return count


def _fit(process: Process, measured: Measurement, request: QueryRequest, limit: float) -> tuple[int, Estimate]:
    """Return the largest chunk with which ``process`` needs at most ``limit`` bytes, and the memory estimate."""
    for chunk in CHUNKS:
        estimate = process(measured, request, chunk)
        if estimate.total <= limit:
            return chunk, estimate
    raise InputError(
        f"resources.memory: a process needs {estimate} to {estimate.stage}, and only {format_bytes(limit)} are "
        f"available besides Python and its libraries; {_remedy(process, measured, request, limit)}"
    )


def _remedy(process: Process, measured: Measurement, request: QueryRequest, limit: float) -> str:
    """Return the change of one setting after which ``process`` needs at most ``limit`` bytes."""

    def fits(**changes: Any) -> bool:
        return process(measured, replace(request, **changes), CHUNKS[-1]).total <= limit

    def fits_body(size: int) -> bool:
        return process(replace(measured, work=replace(work, body_size=size)), request, CHUNKS[-1]).total <= limit

    work, precision = measured.work, replace(request.precision, storage=torch.bfloat16)
    if size := _largest(lambda size: fits(training_batch_size=size), request.training_batch_size):
        return f"lower training.batch_size to {size}"
    if size := _largest(fits_body, work.body_size):
        if work.fraction is None:
            return f"lower strategy.params.num_body_parameters to {size}"
        head_size = measured.num_classes * measured.width
        fraction = (size + head_size) / (measured.num_body_parameters + head_size)
        return f"lower strategy.params.fraction to {math.floor(fraction * 1e8) / 1e8:.8g}"
    if work.body_size and fits_body(0):
        return "set strategy.params.mask to last_layer"
    if fits(precision=precision):
        return "set engine.storage to bfloat16"
    return "choose a smaller model, smaller images, fewer classes, or fewer shards in one process"


def _largest(fits: Callable[[int], bool], upper: int) -> int:
    """Return the largest value from 1 to ``upper`` - 1 that fits, by bisection; 0 if none fits."""
    low = 0
    while upper - low > 1:
        middle = (low + upper) // 2
        low, upper = (middle, upper) if fits(middle) else (low, middle)
    return low

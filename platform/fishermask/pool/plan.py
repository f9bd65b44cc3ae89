"""What a query will need, before it starts: memory, chunks that fit into it, or a refusal that says what to change."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from fishermask.pool.shard import BLOCK, cut, rows_together
from fishermask.tensors.cost import prediction_seconds, query_seconds
from fishermask.tensors.memory import (
    DIAGONAL_BATCH,
    Estimate,
    PredictionProbe,
    Probe,
    checked,
    estimate,
    estimate_prediction,
    fit,
)
from fishermask.tensors.precision import Precision

SPARE = 0.9
"""Share of a machine's free memory that a query may plan with."""


@dataclass(frozen=True)
class Plan:
    """How a query goes about it."""

    chunk: int
    """Images differentiated at once."""
    diagonal_batch: int
    """Images whose Fisher diagonal is computed at once."""
    process: Estimate
    """Of the process that leads the selection, with its shards if they live there."""
    shard: Estimate | None
    """Of each shard that has a process of its own."""
    seconds: float
    """About how long a query takes, if each shard has a core such as this one, and no GPU."""
    main: float
    """Bytes of main memory that ``process`` needs: all of them, or where shards are on GPUs what is not there."""
    shard_main: float = 0.0
    """The same for each ``shard``."""
    gpu: bool = False
    """Whether shards live on GPUs."""

    @property
    def bytes(self) -> float:
        """Of the largest process."""
        return max(self.process.total, 0.0 if self.shard is None else self.shard.total)

    def __str__(self) -> str:
        each = "" if self.shard is None else f", each shard {self.shard}"
        time = f"{self.seconds:.2g} s" if self.seconds < 90 else f"{self.seconds / 60:.0f} min"
        return f"about {time}{' without GPUs' if self.gpu else ''}, {self.process}{each}"


def free_memory(gpu: bool) -> float:
    """Bytes that this process could still use: of the GPU, else of the machine or of the container it runs in."""
    if gpu and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    free = float(psutil.virtual_memory().available)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, float(most) - float(used.read_text()))
    return free


def plan(
    probe: Probe,
    size: int,
    query: int,
    shards: int,
    in_process: bool,
    precision: Precision,
    memory: float | None = None,
    gpu: bool = False,
    labeled: int = 0,
) -> Plan:
    """Plan queries of ``query`` images from a pool of ``size``.

    Args:
        memory: bytes that each process may use; what is free on this machine when not given, where that is known.
        gpu: whether the shards live on GPUs.
        labeled: images that are labeled before the query, at most.

    Raises:
        InputError: it cannot fit; names what takes the most and which setting would help.
    """
    work, base = probe.work, probe.base
    settings: dict[str, Any] = {"storage": precision.storage or base, "scores": precision.scores or base}
    settings |= {"block": BLOCK, "part": rows_together(work.body_size)}
    settings |= {"picks": math.ceil(work.oversample * query), "labeled": labeled}
    images, occupied = _share(size, shards)
    seconds = query_seconds(probe, images, size, query, labeled)
    free = _free(memory, gpu and in_process)

    def leads(chunk: int) -> Estimate:
        return estimate(probe, images=0, shards=0, chunk=chunk, **settings)

    if in_process:
        own = fit(probe, free, images=-(-size // occupied), shards=occupied, **settings)
        main = leads(own.chunk) if gpu else own
        return Plan(own.chunk, probe.diagonal_batch, own, None, seconds, main.total, gpu=gpu)
    # Shards may live on machines of other sizes: what those have free is not known here.
    each = fit(probe, memory if memory is not None else math.inf, images=images, leads=False, **settings)
    leader = checked(leads(each.chunk), free)
    main = estimate(probe, images=0, leads=False, chunk=each.chunk, **settings) if gpu else each
    return Plan(each.chunk, probe.diagonal_batch, leader, each, seconds, leader.total, main.total, gpu)


def plan_prediction(
    probe: PredictionProbe, size: int, shards: int, in_process: bool, memory: float | None = None, gpu: bool = False
) -> Plan:
    """Plan queries that only predict a pool of ``size``; arguments and errors are those of ``plan``."""
    images, occupied = _share(size, shards)
    seconds = prediction_seconds(probe, images)
    free = _free(memory, gpu and in_process)
    leader = estimate_prediction(probe, 0, size, BLOCK)
    if in_process:
        own = checked(estimate_prediction(probe, images, size, BLOCK, occupied), free)
        return Plan(own.chunk, DIAGONAL_BATCH, own, None, seconds, leader.total if gpu else own.total, gpu=gpu)
    each = checked(estimate_prediction(probe, images, 0, BLOCK), memory if memory is not None else math.inf)
    main = estimate_prediction(probe, 0, 0, BLOCK) if gpu else each
    return Plan(each.chunk, DIAGONAL_BATCH, checked(leader, free), each, seconds, leader.total, main.total, gpu)


def _share(size: int, shards: int) -> tuple[int, int]:
    """Images of the largest shard, and how many shards have any."""
    sizes = [end - start for start, end in cut(size, shards)]
    return max(sizes), sum(size > 0 for size in sizes)


def _free(memory: float | None, gpu: bool) -> float:
    return memory if memory is not None else SPARE * free_memory(gpu)

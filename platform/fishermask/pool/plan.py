"""What a query will need, before it starts: memory, chunks that fit into it, or a refusal that says what to change."""

from dataclasses import dataclass
from typing import Any

import psutil
from torch import Tensor, nn

from fishermask.pool.shard import BLOCK, cut
from fishermask.tensors.memory import Estimate, Probe, Workload, estimate, fit
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


def plan(
    work: Workload,
    model: nn.Module,
    image: Tensor,
    size: int,
    shards: int,
    in_process: bool,
    precision: Precision,
    memory: float | None = None,
) -> Plan:
    """Plan queries on a pool of ``size`` images.

    Args:
        image: a normalised image [1, ...].
        memory: bytes that each process may use; what is free on this machine when not given, where that is known.

    Raises:
        InputError: it cannot fit; names what takes the most and which setting would help.
    """
    probe = Probe(model, image, work)
    base = image.dtype
    types: dict[str, Any] = {"storage": precision.storage or base, "scores": precision.scores or base}
    images = max(end - start for start, end in cut(size, shards))
    free = memory if memory is not None else SPARE * psutil.virtual_memory().available
    if in_process:
        own = fit(probe, free, images=images, block=BLOCK, shards=shards, **types)
        return Plan(own.chunk, probe.diagonal_batch, own, None)
    # Shards may live on machines of other sizes: what those have free is not known here.
    each = fit(probe, memory if memory is not None else float("inf"), images=images, block=BLOCK, leads=False, **types)
    leader = estimate(probe, images=0, block=BLOCK, chunk=each.chunk, **types)
    if leader.total > free:
        fit(probe, free, images=0, block=BLOCK, **types)
    return Plan(each.chunk, probe.diagonal_batch, leader, each)

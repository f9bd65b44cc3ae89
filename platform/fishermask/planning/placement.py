"""What a run reserves on a cluster's nodes: CPUs, GPUs and main memory; and whether the nodes have it."""

import math
import os
from dataclasses import dataclass

import torch

from fishermask.config import ResourcesConfig
from fishermask.errors import InputError
from fishermask.planning.memory import format_bytes
from fishermask.planning.query_plan import MEMORY_SHARE, PROCESS_BYTES, QueryPlan, free_memory

Bundle = dict[str, float]
"""CPUs, GPUs and bytes of main memory: what a process requests, and what a node has."""

KINDS = ("CPU", "GPU", "memory")
STEP_BYTES = 0.1e9
"""Requests are whole multiples of this many bytes."""


@dataclass(frozen=True)
class Cluster:
    """The nodes that a sweep runs on, and those that an autoscaler may add."""

    nodes: tuple[Bundle, ...]
    startable: tuple[Bundle, ...] = ()
    autoscaled: bool = False
    """Whether nodes may be added: those of ``startable``, or others where that is empty."""

    @property
    def unlimited(self) -> bool:
        """Whether it is not known what the cluster may have."""
        return self.autoscaled and not self.startable

    def total(self, kind: str) -> float:
        """Return how much of a resource all nodes have."""
        return math.inf if self.unlimited else sum(node.get(kind, 0) for node in (*self.nodes, *self.startable))

    def largest(self, kind: str) -> float:
        """Return how much of a resource the node with the most of it has."""
        nodes = (*self.nodes, *self.startable)
        return math.inf if self.unlimited else max((node.get(kind, 0) for node in nodes), default=0)


def this_machine() -> Cluster:
    """Return this machine as a cluster: what a sweep without one runs on."""
    memory = MEMORY_SHARE * free_memory(gpu=False)
    return Cluster(({"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count()), "memory": memory},))


def num_shards(resources: ResourcesConfig, wanted: int, cluster: Cluster) -> int:
    """Return how many shards a run has; ``auto`` is resolved here and nowhere else.

    Args:
        wanted: as many as memory and work require.
    """
    if resources.shards != "auto":
        return resources.shards
    if resources.workers == "in_process":
        return max(1, min(wanted, int(resources.cpus)))
    count = (cluster.total("CPU") - resources.cpus) / resources.cpus_per_shard
    if resources.gpus_per_shard:
        count = min(count, (cluster.total("GPU") - resources.gpus) / resources.gpus_per_shard)
    return max(1, int(min(count + 1e-9, wanted)))


def bundles(resources: ResourcesConfig, plan: QueryPlan) -> list[Bundle]:
    """Return what a run reserves: its own process first, then one bundle for each Ray shard.

    ``resources.memory`` replaces the estimate.
    """

    def bundle(cpus: float, gpus: float, estimate: float) -> Bundle:
        needed = PROCESS_BYTES + estimate if resources.memory is None else 1e9 * resources.memory
        return {"CPU": cpus, "GPU": gpus, "memory": STEP_BYTES * math.ceil(needed / STEP_BYTES - 1e-9)}

    run = bundle(resources.cpus, resources.gpus, plan.main_bytes)
    if resources.workers == "in_process":
        return [run]
    return [run] + [bundle(resources.cpus_per_shard, resources.gpus_per_shard, plan.shard_main_bytes)] * plan.num_shards


def equal_reservations(requests: dict[str, list[Bundle]], cluster: Cluster) -> dict[str, list[Bundle]]:
    """Return ``requests``, the bundles of each run, all with the memory of the largest, where that fits.

    Ray Tune gives a process only to a run that requests the same, and would start others out of order.
    """
    run = max((request[0]["memory"] for request in requests.values()), default=0.0)
    shard = max((bundle["memory"] for request in requests.values() for bundle in request[1:]), default=0.0)
    raised = {
        name: [request[0] | {"memory": run}, *(bundle | {"memory": shard} for bundle in request[1:])]
        for name, request in requests.items()
    }
    return raised if all(fits(request, cluster.nodes) for request in raised.values()) else requests


def check_placement(request: list[Bundle], cluster: Cluster) -> str | None:
    """Return why ``request`` must wait for an autoscaler; None if the cluster's nodes have all of it, when idle.

    Args:
        request: the bundle of a run's own process, which may be empty, and those of its shards, which are all the same.

    Raises:
        InputError: the nodes lack it, and no autoscaler can add it: the run would wait forever.
    """
    if fits(request, cluster.nodes):
        return None
    needed = [f"{_describe(request[0])} for its own process"] if request[0] else []
    needed += [f"{_describe(request[1])} for each of {len(request) - 1} shards"] if request[1:] else []
    nodes = "; ".join(sorted({_describe(node) for node in cluster.nodes}))
    problem = (
        f"resources: a run needs {' and '.join(needed)}, which do not fit on {len(cluster.nodes)} nodes of {nodes}"
    )
    if cluster.unlimited or fits(request, (*cluster.nodes, *cluster.startable)):
        return problem
    raise InputError(f"{problem}; lower resources.cpus, gpus, shards or memory, or the mask's size, or add nodes")


def _describe(bundle: Bundle) -> str:
    counts = [f"{bundle[kind]:g} {kind}{'s' * (bundle[kind] != 1)}" for kind in KINDS[:2] if bundle.get(kind)]
    return ", ".join([*counts, format_bytes(bundle.get("memory", 0))])


def fits(request: list[Bundle], nodes: tuple[Bundle, ...]) -> bool:
    """Return whether the first bundle fits on some node, and the others, all the same, on what that leaves."""
    unit = 10_000  # Ray counts in these parts; fractions would not add up
    run, *shards = [[round(unit * bundle.get(kind, 0)) for kind in KINDS] for bundle in request]
    free = [[round(unit * node.get(kind, 0)) for kind in KINDS] for node in nodes]

    def copies(node: list[int]) -> int:
        return min((has // need for has, need in zip(node, shards[0], strict=True) if need), default=len(shards))

    for index, node in enumerate(free):
        rest = [has - need for has, need in zip(node, run, strict=True)]
        others = [*free[:index], rest, *free[index + 1 :]]
        if min(rest) >= 0 and (not shards or sum(map(copies, others)) >= len(shards)):
            return True
    return False

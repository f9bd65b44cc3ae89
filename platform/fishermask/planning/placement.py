"""Resources of nodes, resources that a run reserves, and the check that the reservations fit on the nodes."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from fishermask.config import ResourcesConfig
from fishermask.errors import InputError
from fishermask.guard import plural
from fishermask.planning.estimates import PROCESS_BYTES, Estimate, format_bytes
from fishermask.planning.query_plan import QueryPlan

Bundle = dict[str, float]
"""CPUs, GPUs and bytes of main memory that a node has or a process requests."""

KINDS = ("CPU", "GPU", "memory")
UNKNOWN_NODE: Bundle = dict.fromkeys(KINDS, 1e15)
"""Node that stands for all nodes of an autoscaler, if their resources are unknown."""
MEMORY_SHARE = 0.9
"""Share of a machine's free memory that runs may use."""
STEP_BYTES = 0.1e9
"""Requested memory is a multiple of this many bytes."""
UNITS = 10_000
"""Ray counts resources in units of 1 / 10,000."""


@dataclass(frozen=True)
class Cluster:
    """The nodes that a sweep runs on."""

    nodes: tuple[Bundle, ...]
    addable_nodes: tuple[Bundle, ...] = ()
    """Nodes that an autoscaler can start."""
    max_added: int | None = None
    """Largest number of nodes that the autoscaler adds; None for all of them."""

    def total(self, kind: str) -> float:
        """Return the total amount of a resource of all nodes, including those that an autoscaler can add."""
        added = sorted((node.get(kind, 0) for node in self.addable_nodes), reverse=True)[: self.max_added]
        return sum(added) + sum(node.get(kind, 0) for node in self.nodes)

    def largest(self, kind: str) -> float:
        """Return the largest amount of a resource on a single node."""
        return max((node.get(kind, 0) for node in (*self.nodes, *self.addable_nodes)), default=0)


def this_machine() -> Cluster:
    """Return a cluster of this machine alone, for a sweep without Ray."""
    cpus, gpus = float(os.cpu_count() or 1), float(torch.cuda.device_count())
    return Cluster(({"CPU": cpus, "GPU": gpus, "memory": MEMORY_SHARE * free_memory()},))


def free_memory() -> float:
    """Return the bytes of main memory that this process can use, including page cache that can be reclaimed."""
    return min(float(psutil.virtual_memory().available), container_memory(Path("/sys/fs/cgroup")))


def free_gpu_memory() -> float:
    """Return the free bytes of this machine's GPU; infinity without a GPU."""
    return float(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else math.inf


def container_memory(cgroup: Path) -> float:
    """Return the free bytes of the container whose control group is at ``cgroup``; infinity without a limit."""
    limit, used, statistics = (cgroup / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not limit.exists() or (text := limit.read_text().strip()) == "max":
        return math.inf
    lines = dict(line.split() for line in statistics.read_text().splitlines())
    return float(text) - float(used.read_text()) + float(lines.get("inactive_file", 0))


def num_shards(resources: ResourcesConfig, useful: int, cluster: Cluster) -> int:
    """Return the number of shards of a run; ``auto`` is the ``useful`` number, or as many as fit on ``cluster``."""
    if resources.shards != "auto":
        return resources.shards
    if resources.workers == "in_process":
        return max(1, min(useful, int(resources.cpus)))
    count = (cluster.total("CPU") - resources.cpus) / resources.cpus_per_shard
    if resources.gpus_per_shard:
        count = min(count, (cluster.total("GPU") - resources.gpus) / resources.gpus_per_shard)
    return max(1, int(min(count + 1 / UNITS, useful)))


def bundles(resources: ResourcesConfig, plan: QueryPlan) -> list[Bundle]:
    """Return the resources that a run reserves: the bundle of the trial, then the bundle of each Ray shard."""

    def bundle(cpus: float, gpus: float, estimate: Estimate) -> Bundle:
        memory = PROCESS_BYTES + estimate.total if resources.memory is None else 1e9 * resources.memory
        return {"CPU": cpus, "GPU": gpus, "memory": STEP_BYTES * math.ceil(memory / STEP_BYTES - 1e-9)}

    run = bundle(resources.cpus, resources.gpus, plan.coordinator)
    if plan.shard is None:
        return [run]
    return [run] + [bundle(resources.cpus_per_shard, resources.gpus_per_shard, plan.shard)] * plan.num_shards


def equal_reservations(requests: dict[str, list[Bundle]], cluster: Cluster) -> dict[str, list[Bundle]]:
    """Return ``requests`` with the memory of the largest trial and the largest shard in all runs, if all still fit.

    Ray Tune reuses a process only for a run with equal requests, and may start runs with other requests out of order.
    """
    run = max((request[0]["memory"] for request in requests.values()), default=0.0)
    shard = max((bundle["memory"] for request in requests.values() for bundle in request[1:]), default=0.0)
    equal_requests = {
        name: [request[0] | {"memory": run}, *(bundle | {"memory": shard} for bundle in request[1:])]
        for name, request in requests.items()
    }
    return equal_requests if all(fits(request, cluster.nodes) for request in equal_requests.values()) else requests


def check_placement(request: list[Bundle], cluster: Cluster) -> str | None:
    """Return the reason why ``request`` must wait for an autoscaler; None if it fits on the idle nodes.

    Args:
        request: the bundle of the trial, which may be empty, then the bundles of its shards, which are equal.

    Raises:
        InputError: the request does not fit on any nodes that an autoscaler can add, so the run would wait forever.
    """
    if fits(request, cluster.nodes):
        return None
    parts = [f"{_describe(request[0])} for the trial"] if request[0] else []
    parts += [f"{_describe(request[1])} for each of {plural(len(request) - 1, 'shard')}"] if request[1:] else []
    nodes = "; ".join(sorted({_describe(node) for node in cluster.nodes}))
    count = plural(len(cluster.nodes), "node")
    problem = f"resources: a run needs {' and '.join(parts)}, but the cluster has {count} of {nodes}"
    if fits(request, (*cluster.nodes, *cluster.addable_nodes)):
        return problem
    raise InputError(f"{problem}; lower resources.cpus, gpus, shards or memory, or the mask's size, or add nodes")


def _describe(bundle: Bundle) -> str:
    counts = [f"{bundle[kind]:g} {kind}{'s' * (bundle[kind] != 1)}" for kind in KINDS[:2] if bundle.get(kind)]
    return ", ".join([*counts, format_bytes(bundle.get("memory", 0))])


def fits(request: list[Bundle], nodes: tuple[Bundle, ...]) -> bool:
    """Return whether ``nodes`` have room for all bundles; all bundles but the first are equal."""
    run, *shards = [[round(UNITS * bundle.get(kind, 0)) for kind in KINDS] for bundle in request]
    free = [[round(UNITS * node.get(kind, 0)) for kind in KINDS] for node in nodes]

    def capacity(node: list[int]) -> int:
        return min((amount // need for amount, need in zip(node, shards[0], strict=True) if need), default=len(shards))

    for index, node in enumerate(free):
        remainder = [amount - need for amount, need in zip(node, run, strict=True)]
        remaining_nodes = [*free[:index], remainder, *free[index + 1 :]]
        if min(remainder) >= 0 and (not shards or sum(map(capacity, remaining_nodes)) >= len(shards)):
            return True
    return False

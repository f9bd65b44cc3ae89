"""What a run asks of a cluster's nodes, CPUs, GPUs and main memory, and whether they have it."""

import math

from fishermask.config import ResourcesConfig
from fishermask.errors import InputError
from fishermask.pool.plan import Plan
from fishermask.sweep import cluster
from fishermask.tensors.memory import readable

Bundle = dict[str, float]
"""What one process asks of a node: CPUs, GPUs and bytes of main memory. A node is told by the same."""

COUNTED = ("CPU", "GPU")
MEMORY = "memory"

PROCESS = 0.5e9
"""Bytes that a process of a run takes before any query: PyTorch, Ray, a small model and its training. Largest private
memory (RssAnon; torch 2.14 built for CUDA, no GPU) of a trial that queries at random: 480 MB with ``mlp``, 520 MB with
``small_cnn``; of a Ray shard before it gets a model: 400 MB."""
STEP = 0.1e9
"""Requests are whole multiples of this many bytes: runs that are nearly alike then ask alike."""


def bundles(resources: ResourcesConfig, shards: int, plan: Plan | None = None) -> list[Bundle]:
    """What a run reserves: its own process first, then one bundle a Ray shard.

    Args:
        plan: of its queries; without one, they take no memory.
    """

    def bundle(cpus: float, gpus: float, query: float) -> Bundle:
        memory = STEP * math.ceil((PROCESS + query) / STEP)
        return {"CPU": cpus, MEMORY: memory} | ({"GPU": gpus} if gpus else {})

    own = [bundle(resources.cpus, resources.gpus, 0.0 if plan is None else plan.main)]
    if resources.workers == "in_process":
        return own
    each = bundle(resources.cpus_per_shard, resources.gpus_per_shard, 0.0 if plan is None else plan.shard_main)
    return own + [each] * shards


def idle_nodes() -> list[Bundle]:
    """What the connected cluster's nodes have, were they idle."""
    return [node["Resources"] for node in cluster.ray.nodes() if node["Alive"]]


def squeezed(asked: list[Bundle], nodes: list[Bundle]) -> list[Bundle]:
    """``asked``; with less memory, if it fits only so and what a query needs is there nevertheless.

    What Ray counts as a node's memory is about 70 % of what was free when it started. The rest is set aside for the
    object store, which a run hardly fills, and ``pool.plan`` counts on it. A run that fits only so asks for as much
    less, and if that is still too much, for part of what its processes take by themselves: the estimate of a query
    leaves room for that, and what worked on a small machine shall go on to work.
    """
    if lacking(asked, nodes) is not None or lacking_memory(asked, nodes) is None:
        return asked
    workers = [node for node in nodes if node.get("CPU") and node.get(MEMORY)]
    share = max((node[MEMORY] / (node[MEMORY] + node.get("object_store_memory", 0)) for node in workers), default=1)
    # In small steps: the less it leaves of the node, the less can be started beside it.
    for spared in (0.0, 0.25, 0.5, 0.75, 1.0):
        less = [
            bundle | {MEMORY: float(int(share * (bundle[MEMORY] - spared * PROCESS)))} if bundle else bundle
            for bundle in asked
        ]
        if lacking_memory(less, nodes) is None:
            return less
    return asked


def alike(asked: dict[str, list[Bundle]], nodes: list[Bundle]) -> dict[str, list[Bundle]]:
    """Let all runs of a sweep ask for as much memory as the neediest, if that keeps none of them waiting.

    That is so where no process then asks for more of a node's memory than of its CPUs or GPUs. A process can only go on
    to a run that asks alike; between others, the sweep's order would be lost and processes started anew.
    """
    own = max((run[0][MEMORY] for run in asked.values()), default=0.0)
    each = max((bundle[MEMORY] for run in asked.values() for bundle in run[1:]), default=0.0)
    raised = {
        name: [run[0] | {MEMORY: own}, *(bundle | {MEMORY: each} for bundle in run[1:])] for name, run in asked.items()
    }

    def covered(bundle: Bundle, node: Bundle) -> bool:
        """Whether memory is not what limits how many processes such as this one the node holds."""
        share = max(bundle.get(kind, 0) / node[kind] for kind in COUNTED if node.get(kind))
        return bundle[MEMORY] <= share * node.get(MEMORY, 0)

    workers = [node for node in nodes if node.get("CPU")]
    fair = all(covered(bundle, node) for run in raised.values() for bundle in run for node in workers)
    return raised if fair and all(lacking_memory(run, nodes) is None for run in raised.values()) else asked


def check(asked: list[Bundle]) -> str | None:
    """What of ``asked`` the connected cluster must start nodes for; None if it has all of it, were it idle.

    Args:
        asked: the bundle of a run's own process, which may be empty, and those of its shards, which are all alike.

    Raises:
        InputError: it has not, and will not: the run would wait for ever.
    """
    there = idle_nodes()
    found, remedy = lacking(asked, there), "lower it, or the number of shards"
    if found is None:
        found = lacking_memory(asked, there)
        remedy = "choose a smaller strategy.params.fraction or model, more shards (workers: ray), or larger nodes"
    if found is None or cluster.autoscaled():
        return found
    raise InputError(f"{found}; {remedy}")


def lacking_memory(asked: list[Bundle], nodes: list[Bundle]) -> str | None:
    """What is missing if ``asked`` does not fit on ``nodes``, of whose CPUs and GPUs it lacks none."""
    if _fit(asked, nodes, (*COUNTED, MEMORY)):
        return None
    needs = [f"{readable(asked[0][MEMORY])} for its own process"] if asked[0] else []
    if asked[1:]:
        needs.append(f"{readable(asked[-1][MEMORY])} for each of {len(asked) - 1} shards")
    most = readable(max((node.get(MEMORY, 0) for node in nodes), default=0))
    return f"resources: a run needs memory, {' and '.join(needs)}, but the largest of {len(nodes)} nodes has {most}"


def lacking(asked: list[Bundle], nodes: list[Bundle]) -> str | None:
    """What is missing if the CPUs and GPUs of ``asked`` are not there."""
    there = {kind: sum(node.get(kind, 0) for node in nodes) for kind in COUNTED}
    for kind in COUNTED:
        total = sum(bundle.get(kind, 0) for bundle in asked)
        if total > there[kind]:
            has = " and ".join(f"{there[kind]:g} {kind}s" for kind in COUNTED)
            return f"resources: a run asks for {total:g} {kind}s in all, but the cluster has {has}"
        most = max((node.get(kind, 0) for node in nodes), default=0)
        for suffix, bundle in (("", asked[0]), ("_per_shard", asked[-1])):
            if bundle.get(kind, 0) > most:
                return f"resources.{kind.lower()}s{suffix}: {bundle[kind]:g} exceeds the {most:g} {kind}s of a node"
    if not _fit(asked, nodes, COUNTED):
        return f"resources: the {len(asked)} processes of a run, as large as they are, do not fit on {len(nodes)} nodes"
    return None


def _fit(asked: list[Bundle], nodes: list[Bundle], kinds: tuple[str, ...]) -> bool:
    """Whether the first bundle fits on some node, and the others, which are all alike, on what that leaves."""
    unit = 10_000  # Ray counts in these parts; fractions would not add up
    own, *shards = [[round(unit * bundle.get(kind, 0)) for kind in kinds] for bundle in asked]
    room = [[round(unit * node.get(kind, 0)) for kind in kinds] for node in nodes]

    def copies(node: list[int]) -> int:
        return min((have // need for have, need in zip(node, shards[0], strict=True) if need), default=len(shards))

    for index, node in enumerate(room):
        rest = [have - need for have, need in zip(node, own, strict=True)]
        left = [*room[:index], rest, *room[index + 1 :]]
        if min(rest) >= 0 and (not shards or sum(map(copies, left)) >= len(shards)):
            return True
    return False

"""What is missing of a sweep, the checks before it starts, and running it in this process."""

import functools
import math
import os
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console

from fishermask.config import ExperimentConfig, ResourcesConfig
from fishermask.errors import InputError
from fishermask.experiment import loop
from fishermask.experiment.journal import Journal
from fishermask.experiment.loop import MakeShards
from fishermask.experiment.setup import prepare
from fishermask.guard import reason
from fishermask.pool.plan import Plan
from fishermask.pool.shards import LocalShards, Shards
from fishermask.results import files
from fishermask.results.tables import varied_settings
from fishermask.sweep.plan import Run, Sweep, check_folder, shards_of
from fishermask.sweep.recorder import Recorder, rounds_of
from fishermask.tensors.images import Images

History = list[dict[str, Any]]


def check(sweep: Sweep, console: Console, here: bool = False) -> list[str]:
    """Check every run against its data and model, and the folder against what is there, before anything starts.

    Returns a line for each kind of query: what it takes of time and memory.

    Args:
        here: the runs' own processes are this one, whatever cluster may hold their shards.

    Raises:
        InputError: a setting that cannot work, by its dotted path.
    """
    check_folder(sweep)
    plans: dict[str, Plan] = {}
    joined = os.environ.get("RAY_ADDRESS", "local") not in ("", "local")  # then GPUs are elsewhere, and asked for later
    sizes: dict[str, int] = {}
    for run in sweep.runs:
        if (fingerprint := run.config.fingerprint()) not in sizes:
            with console.status(f"checking {run.name}") if console.is_terminal else nullcontext():
                setup = prepare(run.config)
                sizes[fingerprint] = size = len(setup.data.train.labels)
                wanted = setup.wanted_shards() if run.config.resources.shards == "auto" else 0
                room = math.inf if joined else os.cpu_count() or 1
                plan = setup.plan(shards_of(run.config.resources, wanted, room, math.inf))
                if plan is not None:
                    kind = f"{run.config.strategy.name} of {size:,} images, {setup.largest_query()} a query"
                    plans[kind] = max(plan, plans.get(kind, plan), key=lambda plan: plan.bytes)
        resources, size = run.config.resources, sizes[fingerprint]
        if resources.shards != "auto" and resources.shards > size:
            raise InputError(f"resources.shards: {resources.shards} exceeds the pool of {size} images; lower it")
        needed = {"gpus": here or not joined, "gpus_per_shard": not joined}
        if not (here or joined) and resources.cpus > (cores := os.cpu_count() or 1):
            raise InputError(f"resources.cpus: {resources.cpus:g} exceeds the {cores} CPUs of this machine; lower it")
        for field in (field for field, on_this_machine in needed.items() if on_this_machine):
            if getattr(resources, field) and not torch.cuda.is_available():
                raise InputError(f"resources.{field}: this machine has no GPU that PyTorch can use; set it to 0")
    return [f"{kind}: {plan}" for kind, plan in plans.items()]  # the one that needs the most, where several are alike


def missing(sweep: Sweep) -> list[tuple[Run, History]]:
    """The runs that are not finished, with the rounds each has."""
    started = [(run, run.folder.history()) for run in sweep.runs]
    return [(run, history) for run, history in started if len(history) < rounds_of(run)]


def create_folders(sweep: Sweep, runs: list[tuple[Run, History]]) -> None:
    """Make the sweep's folder, and one for each of ``runs`` with its settings and its pool."""
    files.make_folder(sweep.folder)
    resolved = sweep.config.model_dump(exclude={"output"})
    files.write_atomically(sweep.folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
    for run, _ in runs:
        setup = prepare(run.config)
        initial = set(setup.initial.tolist())
        pool = setup.data.train
        rows = (
            (name, setup.data.classes[label], position in initial)
            for position, (name, label) in enumerate(zip(pool.ids, pool.label_numbers(), strict=True))
        )
        run.folder.create(run.config, rows)


class Placed(NamedTuple):
    """How a run is computed, decided where the sweep is started, for whichever process runs it."""

    shards: int
    plan: Plan | None
    """Of its queries; None if they compute nothing."""
    shard_memory: float = 0.0
    """Bytes that each Ray shard reserves."""


def placed(runs: list[tuple[Run, History]], cluster: Mapping[str, float]) -> dict[str, Placed]:
    """How each run is computed, by its name, on a cluster with this many CPUs and GPUs in all.

    Raises:
        InputError: a query does not fit: there may be fewer shards than were wanted.
    """

    def place(run: Run) -> Placed:
        setup, resources = prepare(run.config), run.config.resources
        wanted = setup.wanted_shards() if resources.shards == "auto" else 0
        count = shards_of(resources, wanted, cluster.get("CPU", 0), cluster.get("GPU", 0))
        return Placed(count, setup.plan(count))

    return {run.name: place(run) for run, _ in runs}


def run_here(sweep: Sweep, console: Console) -> Recorder:
    """Run what is missing of a sweep in this process, one run after the other, in the order of the grid.

    Raises:
        InputError: a run's Ray shards ask for more than the connected cluster will ever have.
    """
    runs = missing(sweep)
    if any(run.config.resources.workers == "ray" for run, _ in runs):
        from fishermask.sweep import cluster, room

        places = placed(runs, cluster.ray.cluster_resources())
        for run, _ in runs:
            place = places[run.name]
            shards = room.bundles(run.config.resources, place.shards, place.plan)[1:]
            asked = room.squeezed([{}, *shards], room.idle_nodes())  # this process takes nothing of the cluster's
            room.check(asked)
            places[run.name] = place._replace(shard_memory=asked[-1].get(room.MEMORY, 0.0))
    else:
        places = placed(runs, {})
    create_folders(sweep, runs)
    varied = varied_settings(sweep.folder)
    with Recorder(runs, varied, console, len(sweep.runs) - len(runs), every_round=True) as recorder:
        for run, history in runs:
            try:
                rounds(
                    run.config,
                    places[run.name],
                    history,
                    lambda result, run=run: recorder.record(run.name, result),
                    run.folder.journal,
                    functools.partial(recorder.stage, run.name),
                )
            # Shown at the end, with its traceback in the run's folder; other runs go on. A model may try to exit.
            except (Exception, SystemExit) as error:
                recorder.fail(run.name, describe_failure(error))
    return recorder


def describe_failure(error: BaseException) -> str:
    """Return the traceback of ``error``; its last line is the error in one line, however many its message has."""
    text, line = "".join(traceback.format_exception(error)), reason(error)
    return text if text.rstrip().endswith(line) else f"{text}{line}\n"


def rounds(
    config: ExperimentConfig, place: Placed, history: History, record: Any, journal: Journal, stage: Any = None
) -> None:
    """Run one experiment from where ``history`` ends, handing each round's result to ``record``."""
    # One number whatever runs it: a sum over threads depends on how many there are.
    torch.set_num_threads(max(1, int(config.resources.cpus)))
    setup = prepare(config)
    show = {} if stage is None else {"progress": stage}
    maker = shard_maker(config.resources, place)
    for result in loop.run(setup, maker, history, journal=journal, plan=place.plan, **show):
        record(result.as_dict())


def shard_maker(resources: ResourcesConfig, place: Placed) -> MakeShards:
    """How a run's shards are made, in its own process or as Ray actors."""

    def make(images: Images, statistics: Any) -> Shards:
        if resources.workers == "in_process":
            return LocalShards(images, statistics, place.shards, "cuda" if resources.gpus else "cpu")
        from fishermask.pool.ray_shards import RayShards

        each = (resources.cpus_per_shard, resources.gpus_per_shard)
        return RayShards(images, statistics, place.shards, *each, resources.restarts, place.shard_memory)

    return make

"""Planning the runs of a sweep, finding those that are not finished, and running them in this process."""

import functools
import os
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import yaml
from rich.console import Console

from fishermask.config import ResourcesConfig
from fishermask.errors import InputError
from fishermask.experiment import loop
from fishermask.experiment.inputs import load_inputs
from fishermask.experiment.journal import Journal
from fishermask.experiment.loop import MakeShards
from fishermask.experiment.run_plan import RunPlan, plan_run
from fishermask.guard import reason
from fishermask.planning.placement import Bundle, Cluster, bundles, check_placement
from fishermask.pool.pool import Progress
from fishermask.pool.shards import LocalShards, Shards
from fishermask.results import files
from fishermask.results.tables import strategy_label, varied_settings
from fishermask.sweeps.recorder import QUIET_SECONDS, Recorder
from fishermask.sweeps.sweep_file import Run, Sweep, check_folder
from fishermask.tensors.images import Images

History = list[dict[str, Any]]
Plans = dict[str, RunPlan]
"""The plan of each run, by the run's name."""


def joins_cluster() -> bool:
    """Return whether ``RAY_ADDRESS`` names a cluster that exists already."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def plan_sweep(sweep: Sweep, cluster: Cluster, console: Console, in_process: bool = False) -> Plans:
    """Check every run against its data, its model and the results folder before anything starts, and plan it.

    Args:
        in_process: whether the runs' own processes are this one; only their Ray shards are placed on ``cluster``.

    Raises:
        InputError: a setting that cannot work, by its dotted path.
    """
    check_folder(sweep)
    plans: Plans = {}
    reported = time.monotonic()
    with console.status("") if console.is_terminal else nullcontext() as status:
        for number, run in enumerate(sweep.runs, start=1):
            text = f"checking run {number} of {len(sweep.runs)}: {run.name}"
            if status is not None:
                status.update(text)
            elif time.monotonic() - reported > QUIET_SECONDS:
                console.print(text)
                reported = time.monotonic()
            _check_gpus(run.config.resources, in_process)
            plan = plans[run.name] = plan_run(run.config, cluster)
            if run.config.resources.workers == "ray" or not in_process:
                check_placement(reserved(plan, in_process), cluster)
    return plans


def _check_gpus(resources: ResourcesConfig, in_process: bool) -> None:
    local = {"gpus": in_process or not joins_cluster(), "gpus_per_shard": not joins_cluster()}
    for field in (field for field, on_this_machine in local.items() if on_this_machine):
        if getattr(resources, field) and not torch.cuda.is_available():
            raise InputError(f"resources.{field}: this machine has no GPU that PyTorch can use; set it to 0")


def reserved(plan: RunPlan, in_process: bool = False) -> list[Bundle]:
    """Return what a run reserves of a cluster: nothing for its own process where that is this one."""
    run, *shards = bundles(plan.config.resources, plan.query)
    return [{} if in_process else run, *shards]


def describe_plans(plans: Plans) -> list[str]:
    """Return a line for each size of pool and a line for each strategy.

    The line of a strategy has the estimated time and memory of the run that needs the most.
    """
    largest: Plans = {}
    for plan in plans.values():
        label = strategy_label(plan.config.strategy)
        largest[label] = max(plan, largest.get(label, plan), key=lambda plan: plan.query.largest_bytes)
    pools = dict.fromkeys(plan.pool for plan in plans.values())
    return [*pools, *(f"{label}: {plan.query}" for label, plan in largest.items())]


def missing(sweep: Sweep) -> list[tuple[Run, History]]:
    """Return the runs that are not finished, with the rounds each has."""
    started = [(run, run.folder.history()) for run in sweep.runs]
    return [(run, history) for run, history in started if len(history) < run.config.budget.num_rounds]


def create_folders(sweep: Sweep, runs: list[tuple[Run, History]], plans: Plans) -> None:
    """Create the sweep's folder, and one for each of ``runs`` with its settings and its pool."""
    files.make_folder(sweep.folder)
    resolved = sweep.config.model_dump(exclude={"output"})
    files.write_atomically(sweep.folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
    for run, _ in runs:
        inputs = load_inputs(run.config, plans[run.name].statistics)
        initial = set(inputs.initial.tolist())
        pool = inputs.data.train
        rows = (
            (name, inputs.data.classes[label], position in initial)
            for position, (name, label) in enumerate(zip(pool.ids, pool.label_numbers(), strict=True))
        )
        run.folder.create(run.config, rows)


def run_in_process(sweep: Sweep, plans: Plans, console: Console) -> Recorder:
    """Run what is missing of a sweep in this process, one run after the other, in the order of the grid."""
    runs = missing(sweep)
    create_folders(sweep, runs, plans)
    varied = varied_settings(sweep.folder)
    with Recorder(runs, plans, varied, console, len(sweep.runs) - len(runs), every_round=True) as recorder:
        for run, history in runs:
            try:
                compute_rounds(
                    plans[run.name],
                    history,
                    functools.partial(recorder.record, run.name),
                    run.folder.journal,
                    functools.partial(recorder.show_stage, run.name),
                )
            # Shown at the end, with its traceback in the run's folder; other runs go on. A model may try to exit.
            except (Exception, SystemExit) as error:
                recorder.fail(run.name, describe_failure(error))
    return recorder


def describe_failure(error: BaseException) -> str:
    """Return the traceback of ``error``; its last line is the error in one line, however many its message has."""
    text, line = "".join(traceback.format_exception(error)), reason(error)
    return text if text.rstrip().endswith(line) else f"{text}{line}\n"


def compute_rounds(
    plan: RunPlan,
    history: History,
    record: Callable[[dict[str, Any]], object],
    journal: Journal,
    progress: Progress,
    shard_memory: float | None = None,
) -> None:
    """Run one experiment from where ``history`` ends, handing each round's result to ``record``.

    Args:
        shard_memory: bytes that each Ray shard reserves, where it is not what the plan says.
    """
    resources = plan.config.resources
    # One number whatever runs it: a sum over threads depends on how many there are.
    torch.set_num_threads(max(1, int(resources.cpus)))
    make_shards = shard_maker(plan, shard_memory)
    for result in loop.run(plan.load_inputs(), make_shards, history, progress, journal, plan.query):
        record(result.as_dict())


def shard_maker(plan: RunPlan, shard_memory: float | None = None) -> MakeShards:
    """Return a function that makes a run's shards, in its own process or as Ray actors."""
    resources, count = plan.config.resources, plan.query.num_shards

    def make_shards(images: Images, statistics: Any) -> Shards:
        if resources.workers == "in_process":
            return LocalShards(images, statistics, count, "cuda" if resources.gpus else "cpu")
        from fishermask.pool.ray_shards import RayShards

        memory = reserved(plan)[-1]["memory"] if shard_memory is None else shard_memory
        processors = resources.cpus_per_shard, resources.gpus_per_shard
        return RayShards(images, statistics, count, *processors, resources.restarts, memory)

    return make_shards

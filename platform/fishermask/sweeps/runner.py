"""Plan the runs of a sweep, list the unfinished runs, and compute them in this process."""

import functools
import os
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import yaml
from rich.console import Console

from fishermask.config import ResourcesConfig, hash_json
from fishermask.environment import describe_environment
from fishermask.errors import InputError
from fishermask.experiment import loop
from fishermask.experiment.identity import devices, identify, num_threads
from fishermask.experiment.journal import Journal
from fishermask.experiment.loop import MakeShards
from fishermask.experiment.run_plan import RunPlan, plan_run
from fishermask.guard import reason
from fishermask.planning.placement import Bundle, Cluster, bundles, check_placement
from fishermask.planning.query_plan import format_seconds
from fishermask.pool.pool import Progress
from fishermask.pool.shards import LocalShards, Shards
from fishermask.results import files
from fishermask.results.tables import strategy_label, varied_settings
from fishermask.sweeps.folder_check import check_folder, check_pools, pool_images, pool_key
from fishermask.sweeps.recorder import QUIET_SECONDS, Recorder
from fishermask.sweeps.sweep_file import Run, Sweep
from fishermask.tensors.images import Images

History = list[dict[str, Any]]
Plans = dict[str, RunPlan]
"""Plans by the name of their run."""


def joins_cluster() -> bool:
    """Return whether ``RAY_ADDRESS`` names a cluster that exists already."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def plan_sweep(
    sweep: Sweep,
    cluster: Cluster,
    console: Console,
    in_process: bool = False,
    continue_anyway: bool = False,
    dry_run: bool = False,
) -> Plans:
    """Check every run against its data, its model and the results folder before anything starts, and plan it.

    Args:
        in_process: whether the runs are computed in this process; only their Ray shards are placed on ``cluster``.
        continue_anyway: whether runs whose rounds have another identity may be continued.
        dry_run: whether another process may be writing to the results folder.

    Raises:
        InputError: a setting cannot work; the message begins with its dotted path.
    """
    for note in check_folder(sweep, continue_anyway, dry_run):
        console.print(note)
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
                check_placement(requested_bundles(plan, in_process), cluster)
    check_pools(sweep)
    return plans


def _check_gpus(resources: ResourcesConfig, in_process: bool) -> None:
    is_local = {"gpus": in_process or not joins_cluster(), "gpus_per_shard": not joins_cluster()}
    for field in is_local:
        if is_local[field] and getattr(resources, field) and not torch.cuda.is_available():
            raise InputError(f"resources.{field}: this machine has no GPU that PyTorch can use; set it to 0")


def requested_bundles(plan: RunPlan, in_process: bool = False) -> list[Bundle]:
    """Return the bundles that a run reserves on a cluster. The first bundle is empty if the run is in this process."""
    trial, *shards = bundles(plan.config.resources, plan.query)
    return [{} if in_process else trial, *shards]


def describe_plans(plans: Plans) -> list[str]:
    """Return one or two lines for each distinct pool, one line for each strategy, and one line with the total time.

    The line of a strategy shows the memory of its run with the largest process, and the time of its longest query.
    """
    largest: Plans = {}
    seconds: dict[str, float] = {}
    for plan in plans.values():
        label = strategy_label(plan.config.strategy)
        largest[label] = max(plan, largest.get(label, plan), key=lambda plan: plan.query.largest_bytes)
        seconds[label] = max(plan.query.seconds, seconds.get(label, 0.0))
    pools = dict.fromkeys(line for plan in plans.values() for line in plan.pool)
    lines = [f"{label}: {replace(plan.query, seconds=seconds[label])}" for label, plan in largest.items()]
    total = sum(plan.query.seconds * (plan.config.budget.num_rounds - 1) for plan in plans.values())
    if total:
        lines.append(f"all queries of all runs: about {format_seconds(total)} if no runs are concurrent")
    return [*pools, *lines]


def unfinished_runs(sweep: Sweep) -> list[tuple[Run, History]]:
    """Return the unfinished runs, each with its finished rounds."""
    histories = [(run, run.folder.history()) for run in sweep.runs]
    return [(run, history) for run, history in histories if len(history) < run.config.budget.num_rounds]


def create_folders(sweep: Sweep, runs: list[tuple[Run, History]]) -> None:
    """Create the sweep's folder, the pools of ``runs`` and the folder of each run.

    Raises:
        InputError: a folder cannot be written to, or a run was begun with another pool.
    """
    files.make_folder(sweep.folder)
    path = sweep.folder / "config.yaml"
    content = yaml.safe_dump(sweep.config.model_dump(exclude={"output"}), sort_keys=False)
    if not path.exists():  # first, so that an interrupted command can be repeated
        files.write_atomically(path, content)
    pools: dict[str, str] = {}
    for run, _ in runs:
        config = run.config
        key = pool_key(config)
        if key not in pools:
            pools[key] = files.write_pool(sweep.folder, pool_images(config))
        run.folder.create(config, identify(config), pools[key])
    files.write_atomically(path, content)


def run_in_process(sweep: Sweep, plans: Plans, console: Console) -> Recorder:
    """Compute the unfinished runs of a sweep in this process, one at a time, in the order of the grid."""
    runs = unfinished_runs(sweep)
    create_folders(sweep, runs)
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
            # The other runs continue, and the error is shown at the end. SystemExit: a model may try to exit.
            except (Exception, SystemExit) as error:
                recorder.fail(run.name, describe_failure(error))
    return recorder


def describe_failure(error: BaseException) -> str:
    """Return the traceback of ``error``. Its last line is the whole message of the error."""
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
    """Compute the rounds of a run after those in ``history``; pass each to ``record``.

    Args:
        shard_memory: bytes that each Ray shard reserves; by default, the number in the plan.
    """
    resources = plan.config.resources
    torch.set_num_threads(num_threads(resources))
    origin = {
        "identity": hash_json(identify(plan.config)),
        "environment": describe_environment(devices(resources)["trial"]),
    }
    make_shards = bind_shards(plan, shard_memory)
    for result in loop.run(plan.load_inputs(), make_shards, history, progress, journal, plan.query):
        record(result.as_dict() | origin)


def bind_shards(plan: RunPlan, shard_memory: float | None = None) -> MakeShards:
    """Return a function that creates the shards of a run, in the calling process or as Ray actors."""
    resources, count = plan.config.resources, plan.query.num_shards

    def make_shards(images: Images, statistics: Any) -> Shards:
        if resources.workers == "in_process":
            return LocalShards(images, statistics, count, "cuda" if resources.gpus else "cpu")
        from fishermask.pool.ray_shards import RayShards

        memory = requested_bundles(plan)[-1]["memory"] if shard_memory is None else shard_memory
        processors = resources.cpus_per_shard, resources.gpus_per_shard
        return RayShards(images, statistics, count, *processors, resources.restarts, memory)

    return make_shards

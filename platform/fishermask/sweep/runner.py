"""What is missing of a sweep, the checks before it starts, and running it in this process."""

import os
import traceback
from contextlib import nullcontext
from typing import Any

import torch
import yaml
from rich.console import Console

from fishermask.config import ExperimentConfig, ResourcesConfig
from fishermask.errors import InputError
from fishermask.experiment import loop
from fishermask.experiment.loop import MakeShards
from fishermask.experiment.setup import prepare
from fishermask.pool.shards import LocalShards, Shards
from fishermask.results import files
from fishermask.results.tables import varied_settings
from fishermask.sweep.plan import Run, Sweep, check_folder
from fishermask.sweep.recorder import Recorder, rounds_of
from fishermask.tensors.images import Images

History = list[dict[str, Any]]


def check(sweep: Sweep, console: Console) -> None:
    """Check every run against its data and model, and the folder against what is there, before anything starts.

    Raises:
        InputError: a setting that cannot work, by its dotted path.
    """
    check_folder(sweep)
    seen = set()
    for run in sweep.runs:
        if (fingerprint := run.config.fingerprint()) not in seen:
            seen.add(fingerprint)
            with console.status(f"checking {run.name}") if console.is_terminal else nullcontext():
                prepare(run.config)
        resources = run.config.resources
        if (
            (resources.gpus or resources.gpus_per_shard)
            and not torch.cuda.is_available()
            and "RAY_ADDRESS" not in os.environ
        ):
            raise InputError(
                "resources.gpus: this machine has no GPU that PyTorch can use; set gpus and gpus_per_shard to 0"
            )


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


def run_here(sweep: Sweep, console: Console) -> Recorder:
    """Run what is missing of a sweep in this process, one run after the other, in the order of the grid."""
    runs = missing(sweep)
    create_folders(sweep, runs)
    varied = varied_settings(sweep.folder)
    with Recorder(runs, varied, console, len(sweep.runs) - len(runs), every_round=True) as recorder:
        for run, history in runs:
            try:
                rounds(
                    run.config,
                    history,
                    lambda result, run=run: recorder.record(run.name, result),
                    recorder.stage,
                )
            except Exception:  # shown at the end, with its traceback in the run's folder; other runs go on
                recorder.fail(run.name, traceback.format_exc())
    return recorder


def rounds(config: ExperimentConfig, history: History, record: Any, stage: Any = None) -> None:
    """Run one experiment from where ``history`` ends, handing each round's result to ``record``."""
    # One number whatever runs it: a sum over threads depends on how many there are.
    torch.set_num_threads(max(1, int(config.resources.cpus)))
    setup = prepare(config)
    show = {} if stage is None else {"progress": stage}
    for result in loop.run(setup, shard_maker(config.resources), history, **show):
        record(result.as_dict())


def shard_maker(resources: ResourcesConfig) -> MakeShards:
    """How a run's shards are made, in its own process or as Ray actors."""

    def make(images: Images, statistics: Any) -> Shards:
        if resources.workers == "in_process":
            return LocalShards(images, statistics, resources.shards, "cuda" if resources.gpus else "cpu")
        from fishermask.pool.ray_shards import RayShards

        return RayShards(images, statistics, resources.shards, resources.cpus_per_shard, resources.gpus_per_shard)

    return make

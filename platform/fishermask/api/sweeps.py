"""Runs and sweeps from Python, and their results."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from fishermask.config import parse
from fishermask.errors import InputError
from fishermask.guard import guarded, short
from fishermask.planning.placement import Cluster, this_machine
from fishermask.results import files, report, tables
from fishermask.sweeps import runner, sweep_file
from fishermask.sweeps.sweep_file import Sweep, SweepConfig

if TYPE_CHECKING:
    import pandas as pd


class Config(SweepConfig):
    """Settings of a sweep, the same as in a sweep file.

    Attributes:
        name: name of the sweep; the results are in the folder ``output/name``.
        description: text for the reader of the results.
        base: settings of every run: ``data``, ``imbalance``, ``model``, ``training``, ``budget``, ``strategy``,
            ``seed``, ``engine`` and ``resources``, each with defaults.
        grid: values of the settings that vary, by dotted path into ``base``; every combination is a run.
        output: the folder that contains the results of all sweeps.

    Raises:
        InputError: a value is invalid, or a name is unknown; the message names it and a remedy.
    """

    def __init__(
        self,
        *,
        name: str,
        description: str = "",
        base: dict[str, Any] | None = None,
        grid: dict[str, list[Any]] | None = None,
        output: str = "results",
        **unknown: Any,
    ) -> None:
        given = {"name": name, "description": description, "base": base, "grid": grid, "output": output, **unknown}
        settings = {key: value for key, value in given.items() if value is not None or key not in ("base", "grid")}
        parse(SweepConfig, settings, "config")
        super().__init__(**settings)


@dataclass(frozen=True)
class Results:
    """The results of a run or a sweep.

    Attributes:
        folder: the folder with tables, pictures, and a folder for each run.
        failed: the error of each run that failed, by name of the run, in one line.
    """

    folder: Path
    failed: Mapping[str, str]

    @property
    def rounds(self) -> "pd.DataFrame":
        """The table of all rounds; see ``read_results``."""
        return read_results(self.folder)


def run(
    config: "Config | Mapping[str, Any] | str | PathLike[str]", *, progress: bool = True, continue_anyway: bool = False
) -> Results:
    """Run the first combination of a sweep in this process.

    The folder of the results is not shared with a sweep. An interrupted run continues after its last finished round.

    Args:
        config: a ``Config``, a dictionary with its fields, or the path of a sweep file. Of each setting in ``grid``,
            the run uses the first value.
        progress: whether to print a line for each round.
        continue_anyway: whether to continue a run that began with other settings, another device or other source code;
            its later rounds record the change. By default, such a run is refused.

    Returns:
        The folder of the results, and the error if the run failed.

    Raises:
        InputError: a setting is invalid; the message names the setting and a remedy.
    """
    return _execute(sweep_file.expand(sweep_file.select_first_run(_load(config))), True, progress, continue_anyway)


def sweep(
    config: "Config | Mapping[str, Any] | str | PathLike[str]", *, progress: bool = True, continue_anyway: bool = False
) -> Results:
    """Run every combination of a sweep on Ray, as many concurrently as fit on the machine or the cluster.

    Finished runs are not repeated, and interrupted runs continue after their last finished round. Ray is started on
    this machine and stopped at the end, unless it is initialized already or ``RAY_ADDRESS`` names a cluster.

    Args:
        config: a ``Config``, a dictionary with its fields, or the path of a sweep file.
        progress: whether to print a line for each run, and in a terminal a progress bar.
        continue_anyway: whether to continue runs that began with other settings, another device or other source code;
            their later rounds record the change. By default, such runs are refused.

    Returns:
        The folder of the results, and the errors of the runs that failed.

    Raises:
        InputError: a setting is invalid; the message names the setting and a remedy.
    """
    return _execute(sweep_file.expand(_load(config)), False, progress, continue_anyway)


def read_results(folder: "str | PathLike[str]") -> "pd.DataFrame":
    """Return the table of all rounds of a run or a sweep, one row for each round.

    Columns: ``run``; ``strategy`` (the label) and ``strategy_name``; the settings that vary; ``seed``; ``finished``
    (whether the run has all its rounds); ``round``, ``labels``, metrics such as ``balanced_accuracy``,
    ``recall.CLASS``, ``batch_classes.CLASS``, ``seconds.STAGE`` and ``notes.NAME``.

    Args:
        folder: the folder ``output/name`` of a sweep, which may still be running.

    Raises:
        InputError: the folder does not hold results, or no round is finished.
    """
    if not isinstance(folder, str | PathLike):
        raise InputError(f"folder: is {short(folder)}; expected the path of a folder with results")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(f"folder: {path} is not a folder")
    return tables.read_rounds(path)[0]


def _load(config: object) -> SweepConfig:
    if isinstance(config, SweepConfig):
        return sweep_file.absolute_files(config, Path.cwd())
    if isinstance(config, Mapping):
        return sweep_file.absolute_files(parse(SweepConfig, dict(config), "config"), Path.cwd())
    if isinstance(config, str | PathLike):
        return sweep_file.load(Path(config).expanduser())
    raise InputError(f"config: is {short(config)}; expected a Config, a dictionary or the path of a sweep file")


def _execute(sweep: Sweep, in_process: bool, progress: bool, continue_anyway: bool) -> Results:
    """Check the runs of ``sweep``, and run those that are not finished."""
    for name, value in (("progress", progress), ("continue_anyway", continue_anyway)):
        if not isinstance(value, bool):
            raise InputError(f"{name}: is {short(value)}; expected True or False")
    console = Console(quiet=not progress, markup=False, emoji=False, highlight=False, soft_wrap=True)
    with ExitStack() as stack, _restore_num_threads():
        on_ray = not in_process or sweep.runs[0].config.resources.workers == "ray"
        cluster = _get_cluster(stack) if on_ray else this_machine()
        plans = runner.plan_sweep(sweep, cluster, console, in_process, continue_anyway)
        for line in runner.describe_plans(plans):
            console.print(line)
        if not runner.unfinished_runs(sweep):
            return Results(sweep.folder, {})
        if on_ray:
            _connect(stack, cluster)
        files.make_folder(sweep.folder)
        with files.locked(sweep.folder):
            if in_process:
                recorder = runner.run_in_process(sweep, plans, console)
            else:
                from fishermask.sweeps import tune_runner

                recorder = tune_runner.run_on_ray(sweep, plans, cluster, console)
    if any(run.folder.history() for run in sweep.runs):
        report.write(sweep.folder, grid={run.name for run in sweep.runs})
    return Results(sweep.folder, dict(recorder.failed))


def _get_cluster(stack: ExitStack) -> Cluster:
    """Return the nodes of the cluster in use, or this machine."""
    from fishermask.sweeps import cluster

    if not runner.joins_cluster() and not cluster.ray.is_initialized():
        return this_machine()
    _connect(stack, None)
    return cluster.connected_cluster()


def _connect(stack: ExitStack, nodes: Cluster | None) -> None:
    """Connect to a Ray cluster until ``stack`` closes."""
    from fishermask.sweeps import cluster

    with guarded("RAY_ADDRESS", "Ray cannot be used"):
        stack.enter_context(cluster.connect(nodes))


@contextmanager
def _restore_num_threads() -> Iterator[None]:
    """Restore PyTorch's number of threads after the block, because a run in this process changes it."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)

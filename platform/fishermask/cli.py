"""The command line. Everything that can be set is set in the YAML file or as key=value; there are few options."""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fishermask import __version__
from fishermask.errors import InputError
from fishermask.results.tables import METRICS
from fishermask.stopping import cause, stoppable

if TYPE_CHECKING:
    from fishermask.sweep.plan import Sweep
    from fishermask.sweep.recorder import Recorder

EXIT_FAILED_RUNS, EXIT_BAD_INPUT = 1, 2

EPILOG = """
start here:
  fishermask sweep sweeps/demo.yaml                      run a sweep, then print its summary
  fishermask sweep sweeps/demo.yaml --dry-run            check it and list its runs
  fishermask sweep sweeps/demo.yaml seed=[0,1,2,3,4]     more seeds; finished runs are kept
  fishermask run sweeps/demo.yaml strategy=margin        one run of it, in this process
  tensorboard --logdir results/demo                      look at the curves
"""
OVERRIDES = """
key=value settings:
  seed=3  budget.query=50  strategy=bait  imbalance.ratio=20     dotted paths into the file's base
  strategy='{name: fisher_mask, params: {fraction: 0.02}}'       any YAML value
  seed=[0,1,2]                                                   a list, where the grid varies the path
  grid.training.max_epochs=[50,100]                              vary a path that the file does not
  name=other  output=/data/results                               where results lie: OUTPUT/NAME
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 (a run failed), 2 (bad input), 130 (Ctrl-C) or 143 (SIGTERM)."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    parser = _parser()
    # argparse takes no settings after an option; what it leaves over are settings, or it is right to complain.
    arguments, rest = parser.parse_known_args(argv)
    if not hasattr(arguments, "settings") or any(word.startswith("-") for word in rest):
        arguments = parser.parse_args(argv)
    else:
        arguments.settings += rest
    try:
        with stoppable():
            return int(arguments.command(arguments, console))
    except InputError as error:
        for line in str(error).splitlines():
            print(f"fishermask: {line}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as interrupt:
        stop = cause(interrupt)
        print(f"fishermask: {stop}", file=sys.stderr)
        return stop.status


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="fishermask",
        description="Distributed batch active learning with Fisher information: choose what to label, "
        "and measure honestly whether the choice was better than random.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"fishermask {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=raw)

    run = command("run", "Run one experiment of a sweep file in this process.", OVERRIDES)
    run.set_defaults(command=_run)
    sweep = command("sweep", "Run every combination of a sweep file on Ray; finish what is missing.", OVERRIDES)
    sweep.add_argument("--dry-run", action="store_true", help="check everything and list the runs; run none")
    sweep.set_defaults(command=_sweep)
    for each in (run, sweep):
        each.add_argument("file", type=Path, metavar="FILE", help="YAML file with name, base and grid")
        each.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the file's")
    report = command("report", "Make tables, curves and summary.md again from a sweep's folder.")
    report.add_argument("folder", type=Path, metavar="DIR", help="results/NAME")
    report.add_argument(
        "--metric", choices=METRICS, default="balanced_accuracy", help="metric of the curves (%(default)s)"
    )
    report.set_defaults(command=_report)
    strategies = command("strategies", "List the strategies and their parameters.")
    strategies.set_defaults(command=_strategies)
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> int:
    from fishermask.sweep import plan, runner

    config = plan.single(plan.load(arguments.file, arguments.settings))
    sweep = plan.expand(config)
    runner.check(sweep, console, here=True)
    for key, values in config.grid.items():
        console.print(f"{key} = {values[0]}")
    with ExitStack() as stack:
        if sweep.runs[0].config.resources.workers == "ray":
            from fishermask.sweep import cluster

            stack.enter_context(cluster.connected())
        return _finish(sweep, lambda: runner.run_here(sweep, console), console)


def _sweep(arguments: argparse.Namespace, console: Console) -> int:
    from fishermask.sweep import plan, runner

    sweep = plan.expand(plan.load(arguments.file, arguments.settings))
    runner.check(sweep, console)
    todo = runner.missing(sweep)
    count = len(sweep.runs)
    rounds = sum(runner.rounds_of(run) - len(history) for run, history in todo)
    state = f"{count} runs, {count - len(todo)} finished, {rounds} rounds to go"
    console.print(f"{sweep.config.name}: {state}; results in {sweep.folder}")
    if arguments.dry_run:
        missing = {run.name for run, _ in todo}
        for run in sweep.runs:
            console.print(f"  {'missing ' if run.name in missing else 'finished'}  {run.name}")
        return 0
    if not todo:
        return _show(sweep.folder, "balanced_accuracy", console)
    from fishermask.sweep import cluster, tune_runner

    with cluster.connected():
        return _finish(sweep, lambda: tune_runner.run_on_ray(sweep, console), console)


def _finish(sweep: "Sweep", work: "Callable[[], Recorder]", console: Console) -> int:
    """Do the work of a sweep and show what came of it; signals and failed runs leave what is finished."""
    from fishermask.results import files
    from fishermask.sweep import runner

    try:
        files.make_folder(sweep.folder)
        with files.locked(sweep.folder):
            recorder = work()
    except KeyboardInterrupt as interrupt:
        stop = cause(interrupt)
        left = len(runner.missing(sweep))
        done = len(sweep.runs) - left
        print(
            f"fishermask: {stop}; {done} of {len(sweep.runs)} runs are finished, and all finished rounds are in "
            f"{sweep.folder}; the same command goes on",
            file=sys.stderr,
        )
        return stop.status
    status = 0
    if any(folder for run in sweep.runs if (folder := run.folder.history())):
        status = _show(sweep.folder, "balanced_accuracy", console)
    for name, error in recorder.failed.items():
        log = next(run.folder.error for run in sweep.runs if run.name == name)
        print(f"fishermask: {name} failed: {error}\n  log: {log}", file=sys.stderr)
        status = EXIT_FAILED_RUNS
    return status


def _report(arguments: argparse.Namespace, console: Console) -> int:
    if not arguments.folder.is_dir():
        raise InputError(f"{arguments.folder}: no such folder")
    return _show(arguments.folder, arguments.metric, console)


def _show(folder: Path, metric: str, console: Console) -> int:
    """Write the report of a sweep's folder and print its summary and where to look next."""
    from fishermask.results import report

    summary = report.write(folder, metric)
    header, rows = report.cells(summary, brief=True)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, *cells in zip(header, *rows, strict=True):
        table.add_column(name, min_width=max(map(len, cells)))  # headers may break over lines, numbers may not
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    for line in (
        report.caveat(summary),
        f"curves:      {shown / 'curves.png'}",
        f"tables:      {shown / 'summary.md'}, {shown / 'results.csv'}",
        f"tensorboard: tensorboard --logdir {shown}",
    ):
        console.print(line)
    return 0


def _strategies(arguments: argparse.Namespace, console: Console) -> int:
    from fishermask import strategies

    for name in strategies.available():
        summary, params = strategies.describe(name)
        console.print(f"{name}: {summary}")
        for key, field in params.model_fields.items():
            console.print(f"    {key} = {field.default}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

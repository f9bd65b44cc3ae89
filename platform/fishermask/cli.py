"""The command line. Everything that can be set is set in the YAML file or as key=value; there are few options."""

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fishermask import __version__
from fishermask.errors import InputError
from fishermask.guard import capture_stderr, guarded, one_line, short, write_log
from fishermask.paths import check_path
from fishermask.results.tables import METRICS
from fishermask.stopping import handle_signals, stop_reason

if TYPE_CHECKING:
    from fishermask.planning.placement import Cluster
    from fishermask.sweeps.recorder import Recorder
    from fishermask.sweeps.sweep_file import Sweep

EXIT_FAILED_RUNS, EXIT_BAD_INPUT, EXIT_PIPE = 1, 2, 141
STDOUT_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF)
MAX_LINE = 2000
"""Characters of an error that are shown."""

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
    """Run a command; the exit status is 0, 1 (a run failed), 2 (bad input), 130 (Ctrl-C), 141 (closed pipe)
    or 143 (SIGTERM).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may be unable to show a character
    console = _Console(markup=False, highlight=False, soft_wrap=True)
    try:
        arguments = _arguments(argv)
        try:
            Path.cwd()  # without one, PyTorch's libraries end the process
        except OSError as error:
            raise InputError(f"the working folder: {error.strerror}; change to another") from None
        with handle_signals():
            status = int(arguments.command(arguments, console))
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk can still be reported
        return status
    except InputError as error:
        _complain(error)
        return EXIT_BAD_INPUT
    except OSError as error:
        if error.errno not in STDOUT_ERRORS or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it flushes at its end
        if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
            return EXIT_PIPE
        _complain(InputError(f"stdout: cannot be written to ({error.strerror})"))
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as interrupt:
        stopped = stop_reason(interrupt)
        print(f"fishermask: {stopped}", file=sys.stderr)
        return stopped.status


def _complain(error: InputError) -> None:
    """Print a line for each mistake, and name the log file that holds the details."""
    lines = [one_line(line, MAX_LINE) for line in str(error).split("\n")]
    if error.details:
        lines[-1] += f"; log: {write_log(error.details)}"
    for line in lines:
        print(f"fishermask: {line}", file=sys.stderr)


@contextmanager
def _checks(what: str) -> Iterator[None]:
    """Check the user's input: any exception is an error of the input, and stderr is kept free of other lines.

    What libraries and the user's code write to stderr goes to the log if the check fails, and else to stdout.
    """
    with capture_stderr() as captured:
        try:
            with guarded(what, "cannot be used"):
                yield
        except InputError as error:
            if error.details and (text := captured.pop_text()):
                error.details += f"\nwritten to stderr before:\n{text}"
            raise
        shown = captured.pop_text()
    if shown:
        print(shown, end="" if shown.endswith("\n") else "\n")


class _Console(Console):
    """Leaves a reader that is gone to ``main``, where rich would exit."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as any other mistake: in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    # argparse takes no settings after an option; what it leaves over are settings, or it is right to complain.
    arguments, rest = parser.parse_known_args(argv)
    if not hasattr(arguments, "settings") or any(word.startswith("-") for word in rest):
        return parser.parse_args(argv)
    arguments.settings += rest
    return arguments


def _path(argument: str) -> Path:
    """The type of a FILE or DIR on the command line."""
    try:
        return Path(check_path(argument))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{short(argument)} {error}") from None


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
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
        each.add_argument(
            "--continue-anyway",
            action="store_true",
            help="continue runs whose rounds have other settings, another source or another device; rows record it",
        )
        each.add_argument("file", type=_path, metavar="FILE", help="YAML file with name, base and grid")
        each.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the file's")
    report = command("report", "Make tables, curves and summary.md again from a sweep's folder.")
    report.add_argument("folder", type=_path, metavar="DIR", help="results/NAME")
    report.add_argument(
        "--metric", choices=METRICS, default="balanced_accuracy", help="metric of the curves (%(default)s)"
    )
    report.set_defaults(command=_report)
    strategies = command("strategies", "List the strategies and their parameters.")
    strategies.set_defaults(command=_strategies)
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> int:
    from fishermask.sweeps import runner, sweep_file

    with ExitStack() as stack:
        with _checks(str(arguments.file)):
            config = sweep_file.select_first_run(sweep_file.load(arguments.file, arguments.settings))
            sweep = sweep_file.expand(config)
        ray_shards = sweep.runs[0].config.resources.workers == "ray"
        nodes = _nodes(stack, join=ray_shards)
        with _checks(str(arguments.file)):
            plans = runner.plan_sweep(sweep, nodes, console, True, arguments.continue_anyway)
        for line in runner.describe_plans(plans):
            console.print(line)
        for key, values in config.grid.items():
            console.print(f"{key} = {values[0]}")
        if ray_shards:
            _connect(stack, nodes)
        return _finish(sweep, lambda: runner.run_in_process(sweep, plans, console), console)


def _sweep(arguments: argparse.Namespace, console: Console) -> int:
    from fishermask.sweeps import runner, sweep_file

    with ExitStack() as stack:
        with _checks(str(arguments.file)):
            sweep = sweep_file.expand(sweep_file.load(arguments.file, arguments.settings))
        nodes = _nodes(stack, join=not arguments.dry_run)
        with _checks(str(arguments.file)):
            plans = runner.plan_sweep(sweep, nodes, console, continue_anyway=arguments.continue_anyway)
            todo = runner.unfinished_runs(sweep)
        for line in runner.describe_plans(plans):
            console.print(line)
        count = len(sweep.runs)
        rounds = sum(run.config.budget.num_rounds - len(history) for run, history in todo)
        state = f"{count} runs, {count - len(todo)} finished, {rounds} rounds to go"
        console.print(f"{sweep.config.name}: {state}; results in {sweep.folder}")
        if arguments.dry_run:
            missing = {run.name for run, _ in todo}
            for run in sweep.runs:
                console.print(f"  {'missing ' if run.name in missing else 'finished'}  {run.name}")
            return 0
        if not todo:
            return _show(sweep.folder, "balanced_accuracy", console)
        from fishermask.sweeps import tune_runner

        _connect(stack, nodes)
        return _finish(sweep, lambda: tune_runner.run_on_ray(sweep, plans, nodes, console), console)


def _nodes(stack: ExitStack, join: bool) -> "Cluster":
    """Return the nodes that runs are planned for: those of the cluster at ``RAY_ADDRESS``, or this machine.

    Args:
        join: whether to connect to that cluster; otherwise what it has stays unknown.
    """
    from fishermask.planning.placement import Cluster, this_machine
    from fishermask.sweeps import runner

    if not runner.joins_cluster():
        return this_machine()
    if not join:
        return Cluster((), autoscaled=True)
    from fishermask.sweeps import cluster

    _connect(stack, None)
    return cluster.connected_cluster()


def _connect(stack: ExitStack, nodes: "Cluster | None") -> None:
    """Be connected to a Ray cluster until ``stack`` closes."""
    from fishermask.sweeps import cluster

    with guarded("RAY_ADDRESS", "Ray cannot be used"):
        stack.enter_context(cluster.connect(nodes))


def _finish(sweep: "Sweep", work: "Callable[[], Recorder]", console: Console) -> int:
    """Do the work of a sweep and show what came of it; signals and failed runs leave what is finished."""
    from fishermask.results import files
    from fishermask.sweeps import runner

    try:
        files.make_folder(sweep.folder)
        with files.locked(sweep.folder):
            recorder = work()
    except KeyboardInterrupt as interrupt:
        stopped = stop_reason(interrupt)
        left = len(runner.unfinished_runs(sweep))
        done = len(sweep.runs) - left
        print(
            f"fishermask: {stopped}; {done} of {len(sweep.runs)} runs are finished, and all finished rounds are in "
            f"{sweep.folder}; run the same command again to continue",
            file=sys.stderr,
        )
        return stopped.status
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

    with _checks(str(folder)):
        written = report.write(folder, metric)
        header, rows = report.format_brief_summary(written.summary)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        # Settings and labels may break over lines, numbers may not.
        table.add_column(name, no_wrap=index >= header.index("seeds"), overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    for line in (
        report.BRIEF_NOTE,
        " ".join(report.format_notes(written)),
        f"curves:      {shown / 'curves.png'}",
        f"tables:      {shown / 'summary.md'}, {shown / 'results.csv'}",
        f"tensorboard: tensorboard --logdir {shown}",
    ):
        console.print(line)
    return 0


def _strategies(arguments: argparse.Namespace, console: Console) -> int:
    from fishermask import query_strategies

    with _checks("strategies"):
        described = {name: query_strategies.describe(name) for name in query_strategies.available()}
    for name, (summary, params) in described.items():
        console.print(f"{name}: {summary}")
        for key, field in params.model_fields.items():
            console.print(f"    {key} = {field.default}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

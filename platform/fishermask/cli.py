"""The ``fishermask`` command. Settings come from the sweep file and from ``key=value`` arguments."""

import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fishermask import __version__
from fishermask.errors import InputError
from fishermask.guard import capture_stderr, guarded, one_line, plural, short, write_log
from fishermask.paths import check_path
from fishermask.results.tables import METRICS, strategy_label
from fishermask.stopping import handle_signals, stop_reason

if TYPE_CHECKING:
    from fishermask.planning.placement import Cluster
    from fishermask.sweeps.recorder import Recorder
    from fishermask.sweeps.sweep_file import Sweep

EXIT_FAILED_RUNS, EXIT_BAD_INPUT, EXIT_PIPE = 1, 2, 141
STDOUT_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF)
MAX_LINE = 2000
"""Maximum number of characters of an error line."""
SETTING = re.compile(r"[A-Za-z_][\w.]*=", re.ASCII)
"""Start of an argument that is a setting, and not a file."""
TEMPLATE = Path(__file__).parent / "sweeps/template.yaml"
"""Sweep file that ``init`` copies, and that ``run`` uses if the user names no file."""

HELP = """Choose which samples to label, and measure how much better that is than choosing at random.

\b
Start here:
  fishermask init                                 write sweep.yaml, a small sweep to start from
  fishermask sweep sweep.yaml                     run it, then print its summary
  fishermask sweep sweep.yaml --dry-run           check it and list its runs
  fishermask sweep sweep.yaml seed=[0,1,2,3,4]    use more seeds; finished runs are kept
  fishermask run strategy=margin                  run one small experiment, without a file
  tensorboard --logdir results/sweep              view the learning curves
"""
SETTINGS = """
\b
KEY=VALUE replaces a setting of the file; fishermask settings lists all of them:
  seed=3  budget.query=50  strategy=bait  imbalance=balanced       dotted paths into the file's base
  strategy='{name: fisher_mask, params: {mask: last_layer}}'       any YAML value
  seed=[0,1,2]                                                     a list, for a path that the grid varies
  grid.training.max_epochs=[50,100]                                vary a path that the file does not vary
  name=other  output=/data/results                                 write results to OUTPUT/NAME
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    The status is 0, 1 (a run failed), 2 (bad input), 130 (Ctrl-C), 141 (closed pipe) or 143 (SIGTERM).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may be unable to show a character
    try:
        with handle_signals():
            status = _invoke(sys.argv[1:] if argv is None else argv)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk can still be reported
        return status
    except InputError as error:
        _print_error(error)
        return EXIT_BAD_INPUT
    except OSError as error:
        if error.errno not in STDOUT_ERRORS or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise Python reports an error when it flushes at exit
        if isinstance(error, BrokenPipeError):  # the reader of the output has closed it
            return EXIT_PIPE
        _print_error(InputError(f"stdout: cannot be written to ({error.strerror})"))
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as interrupt:
        reason = stop_reason(interrupt)
        print(f"fishermask: {reason}", file=sys.stderr)
        return reason.status


def _invoke(argv: Sequence[str]) -> int:
    """Parse the command line and call the command. An error becomes one line; ``click`` would print several."""
    console = _Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    try:
        with commands.make_context("fishermask", list(argv), obj=console) as context:
            return int(commands.invoke(context) or 0)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "fishermask"
        raise InputError(f"{one_line(error.format_message(), MAX_LINE).rstrip('.')}; see {command} --help") from None


def _print_error(error: InputError) -> None:
    """Print one line for each mistake, and the path of the log file that holds the details."""
    lines = [one_line(line, MAX_LINE) for line in str(error).split("\n")]
    if error.details:
        lines[-1] += f"; log: {write_log(error.details)}"
    for line in lines:
        print(f"fishermask: {line}", file=sys.stderr)


@contextmanager
def _check_input(name: str) -> Iterator[None]:
    """Convert any exception of the block to an input error of ``name``, and capture stderr.

    Text that libraries and the user's code write to stderr goes to the log if there is an error, otherwise to stdout.
    """
    with capture_stderr() as captured:
        try:
            with guarded(name, "cannot be used"):
                yield
        except InputError as error:
            if error.details and (text := captured.pop_text()):
                error.details += f"\nwritten to stderr before:\n{text}"
            raise
        text = captured.pop_text()
    if text:
        print(text, end="" if text.endswith("\n") else "\n")


class _Console(Console):
    """A console that raises ``BrokenPipeError``, where rich would exit."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class _PathType(click.ParamType):
    """A path on the command line."""

    name = "path"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Path:
        try:
            return Path(check_path(str(value)))
        except ValueError as error:
            self.fail(f"{short(value)} {error}", parameter, context)


PATH = _PathType()
CONTINUE_OPTION = click.option(
    "--continue-anyway",
    is_flag=True,
    help="Continue runs that began with other settings, source code or devices. New rounds record the change.",
)
HELP_OPTIONS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


@click.group(help=HELP, context_settings=HELP_OPTIONS, no_args_is_help=False)
@click.version_option(__version__, message="fishermask %(version)s")
def commands() -> None:
    try:
        Path.cwd()  # without a working folder, PyTorch's libraries end the process
    except OSError as error:
        raise InputError(f"the working folder: {error.strerror}; change to another folder") from None


@commands.command("init", short_help="Write a sweep file to start from.")
@click.argument("name", default="sweep")
@click.pass_obj
def init_command(console: Console, name: str) -> None:
    """Write NAME.yaml, a commented sweep file to start from (default: sweep.yaml)."""
    from fishermask.config import parse
    from fishermask.sweeps.sweep_file import SweepConfig

    name = re.sub(r"\.ya?ml$", "", name)
    parse(SweepConfig, {"name": name})
    file = Path(f"{name}.yaml")
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(TEMPLATE.read_text(encoding="utf-8").replace("name: sweep ", f"name: {name} ", 1))
    except FileExistsError:
        raise InputError(f"{file}: already exists; choose another name: fishermask init NAME") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}); change to another folder") from None
    console.print(f"wrote {file}; next:")
    console.print(f"  fishermask sweep {file} --dry-run    check it and list its runs")
    console.print(f"  fishermask sweep {file}              run it; results are written to results/{name}")


@commands.command("run", epilog=SETTINGS, short_help="Run one experiment in this process.")
@click.argument("words", nargs=-1, metavar="[FILE] [KEY=VALUE]...")
@CONTINUE_OPTION
@click.pass_obj
def run_command(console: Console, words: tuple[str, ...], continue_anyway: bool) -> int:
    """Run one experiment in this process, with the first value of each path that the grid of FILE varies.

    Without FILE, run a small experiment on the bundled data.
    """
    from fishermask.listing import format_value
    from fishermask.sweeps import runner, sweep_file

    has_file = bool(words) and not SETTING.match(words[0])
    file = PATH.convert(words[0], None, None) if has_file else TEMPLATE
    with ExitStack() as stack:
        with _check_input(str(file)):
            config = sweep_file.select_first_run(sweep_file.load(file, words[has_file:]))
            sweep = sweep_file.expand(config)
        ray_shards = sweep.runs[0].config.resources.workers == "ray"
        nodes = _planned_nodes(stack, connect=ray_shards)
        with _check_input(str(file)):
            plans = runner.plan_sweep(sweep, nodes, console, True, continue_anyway)
        for line in runner.describe_plans(plans):
            console.print(line)
        for key, values in config.grid.items():
            label = strategy_label(sweep.runs[0].config.strategy)
            console.print(f"{key} = {label if key == 'strategy' else format_value(values[0])}")
        if ray_shards:
            _connect(stack, nodes)
        return _run_and_report(sweep, lambda: runner.run_in_process(sweep, plans, console), console)


@commands.command("sweep", epilog=SETTINGS, short_help="Run all combinations of a sweep file on Ray.")
@click.argument("file", type=PATH)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Check everything and list the runs; run and download nothing.")
@CONTINUE_OPTION
@click.pass_obj
def sweep_command(console: Console, file: Path, settings: tuple[str, ...], dry_run: bool, continue_anyway: bool) -> int:
    """Run all combinations of the sweep file FILE on Ray.

    Finished runs are kept: run the same command again to continue an interrupted sweep.
    """
    from fishermask.data import sources
    from fishermask.sweeps import runner, sweep_file

    with ExitStack() as stack:
        with _check_input(str(file)):
            sweep = sweep_file.expand(sweep_file.load(file, settings))
            data_sets = {run.config.data for run in sweep.runs} if dry_run else set()
            to_download = [data for data in data_sets if sources.needs_download(data)]
        nodes = _planned_nodes(stack, connect=not dry_run)
        with _check_input(str(file)):
            plans = {}
            if to_download:  # a dry run downloads nothing
                for data in to_download:
                    missing_data = f"{data.name} is not in {data.root}"
                    console.print(f"data.download: {missing_data}; a sweep downloads it, and then checks the runs")
            else:
                plans = runner.plan_sweep(sweep, nodes, console, False, continue_anyway, dry_run)
            unfinished = runner.unfinished_runs(sweep)
        for line in runner.describe_plans(plans):
            console.print(line)
        count = len(sweep.runs)
        rounds = sum(run.config.budget.num_rounds - len(history) for run, history in unfinished)
        state = f"{plural(count, 'run')}, {count - len(unfinished)} finished, {plural(rounds, 'round')} to go"
        console.print(f"{sweep.config.name}: {state}; results in {sweep.folder}")
        if dry_run:
            unfinished_names = {run.name for run, _ in unfinished}
            for run in sweep.runs:
                console.print(f"  {'missing ' if run.name in unfinished_names else 'finished'}  {run.name}")
            return 0
        if not unfinished:
            return _print_report(sweep.folder, "balanced_accuracy", console, {run.name for run in sweep.runs})
        from fishermask.sweeps import tune_runner

        _connect(stack, nodes)
        return _run_and_report(sweep, lambda: tune_runner.run_on_ray(sweep, plans, nodes, console), console)


@commands.command("report", short_help="Write the tables and curves of a sweep again.")
@click.argument("folder", type=PATH, metavar="DIR")
@click.option("--metric", type=click.Choice(list(METRICS)), default="balanced_accuracy", help="Metric of the curves.")
@click.pass_obj
def report_command(console: Console, folder: Path, metric: str) -> int:
    """Write the tables, curves and summary.md of the sweep in DIR (results/NAME) again."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of a sweep's results, such as results/NAME")
    from fishermask.sweeps import sweep_file

    return _print_report(folder, metric, console, sweep_file.run_names(folder))


def _add_listing(name: str, text: str) -> None:
    @commands.command(name, help=text)
    @click.pass_obj
    def command(console: Console) -> None:
        from fishermask import listing

        with _check_input(name):
            lines = list(getattr(listing, f"list_{name}")())
        for line in lines:
            console.print(line)


_add_listing("settings", "List all settings of a run, with types and defaults.")
_add_listing("datasets", "List the data sets.")
_add_listing("models", "List the models and their parameters.")
_add_listing("strategies", "List the query strategies and their parameters.")


def _planned_nodes(stack: ExitStack, connect: bool) -> "Cluster":
    """Return the nodes that runs are planned for: those of the cluster at ``RAY_ADDRESS``, or this machine.

    Args:
        connect: whether to connect to the cluster; otherwise its resources are unknown.
    """
    from fishermask.planning.placement import UNKNOWN_NODE, Cluster, this_machine
    from fishermask.sweeps import runner

    if not runner.joins_cluster():
        return this_machine()
    if not connect:
        return Cluster((), (UNKNOWN_NODE,))
    from fishermask.sweeps import cluster

    _connect(stack, None)
    return cluster.connected_cluster()


def _connect(stack: ExitStack, nodes: "Cluster | None") -> None:
    """Connect to a Ray cluster until ``stack`` closes."""
    from fishermask.sweeps import cluster

    with guarded("RAY_ADDRESS", "Ray cannot be used"):
        stack.enter_context(cluster.connect(nodes))


def _run_and_report(sweep: "Sweep", work: "Callable[[], Recorder]", console: Console) -> int:
    """Run a sweep by calling ``work``, and report the results. An interruption keeps the finished rounds."""
    from fishermask.results import files
    from fishermask.sweeps import runner

    try:
        files.make_folder(sweep.folder)
        with files.locked(sweep.folder):
            recorder = work()
    except KeyboardInterrupt as interrupt:
        reason = stop_reason(interrupt)
        num_finished = len(sweep.runs) - len(runner.unfinished_runs(sweep))
        print(
            f"fishermask: {reason}; {num_finished} of {len(sweep.runs)} runs are finished, and all finished rounds are "
            f"in {sweep.folder}; run the same command again to continue",
            file=sys.stderr,
        )
        return reason.status
    status = 0
    if any(folder for run in sweep.runs if (folder := run.folder.history())):
        status = _print_report(sweep.folder, "balanced_accuracy", console, {run.name for run in sweep.runs})
    for name, error in recorder.failed.items():
        log = next(run.folder.error for run in sweep.runs if run.name == name)
        print(f"fishermask: {name} failed: {error}\n  log: {log}", file=sys.stderr)
        status = EXIT_FAILED_RUNS
    return status


def _print_report(folder: Path, metric: str, console: Console, grid: set[str] | None) -> int:
    """Write the report of a sweep's folder, and print its summary and the paths of its files."""
    from fishermask.results import report

    with _check_input(str(folder)):
        sweep_report = report.write(folder, metric, grid)
        header, rows = report.format_brief_summary(sweep_report.summary)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        # Text may wrap; numbers may not.
        table.add_column(name, no_wrap=index >= header.index("seeds"), overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)
    relative = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    for line in (
        report.BRIEF_NOTE,
        " ".join(report.format_notes(sweep_report)),
        f"curves:      {relative / 'curves.png'}",
        f"tables:      {relative / 'summary.md'}, {relative / 'results.csv'}",
        f"tensorboard: tensorboard --logdir {relative}",
    ):
        console.print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())

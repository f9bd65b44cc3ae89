"""Records the rounds of runs as they arrive, in files and for TensorBoard, and shows progress."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fishermask.experiment.run_plan import RunPlan
from fishermask.results.files import writing
from fishermask.results.tables import error_line, strategy_label
from fishermask.sweeps.eta import RoundSeconds, TimeEstimator, format_duration, planned_rounds
from fishermask.sweeps.sweep_file import Run
from fishermask.sweeps.tensorboard import RunEvents

QUIET_SECONDS, MAX_QUIET_SECONDS = 10.0, 300.0
"""Without a terminal, seconds after the last line at which a line shows progress: at the start, and after hours."""
REFRESH_SECONDS = 0.2
"""In a terminal, time between two updates of the display."""
STAGE_NAMES = {
    "train": "training",
    "evaluate": "evaluation",
    "fisher diagonal": "Fisher diagonal",
    "embed": "embeddings",
    "predict": "predictions",
    "information": "information matrices",
    "prune": "pruning",
}


def quiet_seconds(elapsed: float) -> float:
    """Return the time between two lines of progress without a terminal, ``elapsed`` seconds after the start."""
    return min(MAX_QUIET_SECONDS, max(QUIET_SECONDS, elapsed / 20))


def describe_stage(stage: str, done: int, total: int) -> str:
    """Return a text such as ``pick 35/100``, ``embeddings 40%`` or ``training, 12 of at most 60 epochs``."""
    name = STAGE_NAMES.get(stage, stage)
    if total <= 1:
        return name
    if stage == "train":
        return f"{name}, {done} of at most {total} epochs"
    return f"{name} {done}/{total}" if "pick" in stage else f"{name} {done / total:.0%}"


class Recorder:
    """Writer of the rounds of several runs, with progress as a live bar in a terminal, and as plain lines elsewhere.

    Use as a context manager.

    Args:
        runs: the runs to finish, with the finished rounds of each.
        plans: the plan of each run.
        varied: dotted paths that the sweep varies.
        finished: number of runs of the sweep that were finished before.
        every_round: whether to print a line for each round instead of each run.
    """

    def __init__(
        self,
        runs: list[tuple[Run, list[dict[str, Any]]]],
        plans: Mapping[str, RunPlan],
        varied: list[str],
        console: Console,
        finished: int = 0,
        every_round: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.varied, self.every_round, self.clock = console, varied, every_round, clock
        self.history = {run.name: list(history) for run, history in runs}
        self.runs = {run.name: run for run, _ in runs}
        self.events: dict[str, RunEvents] = {}
        self.failed: dict[str, str] = {}
        self.finished, self.total_runs = finished, finished + len(runs)
        self.total = sum(run.config.budget.num_rounds - len(history) for run, history in runs)
        self.done = 0
        self.estimator = TimeEstimator(
            {name: planned_rounds(plans[name]) for name in self.runs},
            {name: strategy_label(run.config.strategy) for name, run in self.runs.items()},
            {name: len(history) for name, history in self.history.items()},
        )
        self.started = self.last_line = self.last_refresh = clock()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rounds"),
        )
        last_columns = (TimeElapsedColumn(), TextColumn("{task.fields[eta]}"))
        self.bar = Progress(*columns, *last_columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=self.total, eta="")

    def __enter__(self) -> "Recorder":
        self.bar.start()
        self._refresh("starting")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        for events in self.events.values():
            events.writer.close()

    def eta(self) -> str:
        """Return the time until all runs are finished, as text."""
        seconds = self.estimator.seconds_left(self.clock())
        return "ETA unknown" if seconds is None else f"ETA {format_duration(seconds)}"

    def show_stage(self, name: str, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` parts of a stage of the run ``name`` are done."""
        finished, num_rounds = len(self.history[name]), self.runs[name].config.budget.num_rounds
        if name in self.failed or finished == num_rounds:
            return  # a late report
        now = self.clock()
        self.estimator.start_stage(name, stage, done, total, now)
        text = f"{name}: round {finished + 1}/{num_rounds}, {describe_stage(stage, done, total)}"
        if self.console.is_terminal:
            if now - self.last_refresh >= REFRESH_SECONDS:
                self._refresh(text)
        elif now - self.last_line >= quiet_seconds(now - self.started):
            self._print(text)

    def record(self, name: str, result: dict[str, Any]) -> None:
        """Write a round of the run ``name`` to its folder and to TensorBoard, and show it.

        A round that was recorded before is ignored, because a process may report a round, be lost, and report it again.
        """
        if result["round"] < len(self.history[name]):
            return
        run = self.runs[name]
        run.folder.append(result)
        if name not in self.events:
            self.events[name] = RunEvents(run.folder, run.config, self.varied, self.history[name])
        self.events[name].add(result)
        self.history[name].append(result)
        self.done += 1
        seconds = result["seconds"]
        round_seconds = RoundSeconds(seconds["train"] + seconds["evaluate"], seconds["query"])
        self.estimator.finish_round(name, round_seconds, self.clock())
        is_last = len(self.history[name]) == run.config.budget.num_rounds
        if is_last:
            self.events.pop(name).finish()
            self.finished += 1
        if is_last or self.every_round:
            text = f"{name}: labels {result['labels']}, balanced accuracy {_format(result['balanced_accuracy'])}"
            if self.every_round:
                stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items() if ":" not in stage)
                text += f", {result['epochs']} epochs ({result['ended_by']}), {stages}"
            self._print(text)
        self._refresh(name)

    def report_restart(self, name: str, attempt: int, restarts: int) -> None:
        """Print that a run resumes after its process was lost."""
        rounds = f"{len(self.history[name])} of {self.runs[name].config.budget.num_rounds} rounds"
        self.console.print(f"restarted: {name}: its process was lost ({attempt}/{restarts}); it resumes after {rounds}")

    def fail(self, name: str, error: str) -> None:
        """Write the error that ended a run to its folder, and print its last line."""
        run = self.runs[name]
        with writing(run.folder.error):
            run.folder.error.write_text(error, encoding="utf-8", errors="backslashreplace")
        self.failed[name] = error_line(error)
        self.estimator.remove(name)
        self.console.print(f"failed: {name}: {self.failed[name]}")

    def _print(self, text: str) -> None:
        counts = f"{self.finished}/{self.total_runs} runs, {self.done}/{self.total} rounds"
        self.console.print(f"[{counts}, {self.eta()}] {text}")
        self.last_line = self.clock()

    def _refresh(self, text: str) -> None:
        if not self.console.is_terminal:
            return
        now = self.last_refresh = self.clock()
        fractions = sum(self.estimator.round_fraction(run, now) for run in self.estimator.stages)
        description = f"{self.finished}/{self.total_runs} runs  {text}"
        self.bar.update(self.task, completed=self.done + fractions, description=description, eta=self.eta())


def _format(metric: float | None) -> str:
    return "unknown" if metric is None else f"{metric:.3f}"

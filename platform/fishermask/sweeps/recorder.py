"""Where rounds go as they come: files, TensorBoard, and the eyes of whoever waits."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fishermask.results.files import writing
from fishermask.sweeps.eta import StageTimer, format_duration, time_left
from fishermask.sweeps.sweep_file import Run
from fishermask.sweeps.tensorboard import RunEvents


def rounds_of(run: Run) -> int:
    """Rounds that a finished run has."""
    return run.config.budget.num_rounds


QUIET_SECONDS = 30.0
"""Where there is no live display, a line says how far a run is when nothing was said for this long."""


class Recorder:
    """Records the rounds of several runs and shows progress: a live bar in a terminal, plain lines elsewhere.

    Use as a context manager.

    Args:
        runs: the runs still to finish, with the rounds each has already.
        finished: how many runs of the sweep were finished before.
        every_round: one plain line a round, not only one a run.
    """

    def __init__(
        self,
        runs: list[tuple[Run, list[dict[str, Any]]]],
        varied: list[str],
        console: Console,
        finished: int = 0,
        every_round: bool = False,
    ) -> None:
        self.console, self.varied, self.every_round = console, varied, every_round
        self.history = {run.name: list(history) for run, history in runs}
        self.runs = {run.name: run for run, _ in runs}
        self.events: dict[str, RunEvents] = {}
        self.failed: dict[str, str] = {}
        self.finished, self.total_runs = finished, finished + len(runs)
        self.total = sum(rounds_of(run) - len(history) for run, history in runs)
        self.done = 0
        self.models: list[float] = []
        self.queries: list[float] = []
        self.started = self.spoke = self.last = time.monotonic()
        self.stage_timer = StageTimer()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rounds"))
        self.bar = Progress(
            *columns,
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=self.total, eta="")

    def __enter__(self) -> "Recorder":
        self.bar.start()
        self._show("starting")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        for events in self.events.values():
            events.writer.close()

    def eta(self) -> str:
        """Time left, from the mean times of a model and of a query so far."""
        if not self.done:
            return "ETA unknown"
        going = [run for name, run in self.runs.items() if name not in self.failed]
        rounds = [rounds_of(run) - len(self.history[run.name]) for run in going]
        batches = sum(max(0, count - 1) for count in rounds)
        left = time_left(self.last - self.started, self.models, self.queries, sum(rounds), batches)
        return f"ETA {format_duration(max(0.0, left - (time.monotonic() - self.last)))}"

    def stage(self, name: str, stage: str, done: int, total: int) -> None:
        """Show how far the current stage of a round of the run ``name`` is."""
        text = self.stage_timer.update(name, stage, done, total)
        self._show(text if self.every_round else f"{name}: {text}")
        if not self.console.is_terminal and time.monotonic() - self.spoke > QUIET_SECONDS:
            rounds = rounds_of(self.runs[name])
            self._say(f"  {name}: round {min(len(self.history[name]) + 1, rounds)}/{rounds}, {text}")

    def record(self, name: str, result: dict[str, Any]) -> None:
        """Write a round of the run ``name`` to its folder and to TensorBoard, and show it.

        A round that is there already is not written again: a process may be lost when it has just reported one.
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
        self.models.append(seconds["train"] + seconds["evaluate"])
        if result["batch"]:
            self.queries.append(seconds["query"])
        self.last = time.monotonic()
        last = len(self.history[name]) == rounds_of(run)
        if last:
            self.events.pop(name).finish()
            self.finished += 1
        if last or self.every_round:
            place = f"[{self.finished}/{self.total_runs} runs, {self.done}/{self.total} rounds, {self.eta()}]"
            facts = f"labels {result['labels']}, balanced accuracy {result['balanced_accuracy']:.3f}"
            if self.every_round:
                stages = ", ".join(
                    f"{stage} {seconds:.1f} s" for stage, seconds in result["seconds"].items() if ":" not in stage
                )
                facts += f", {result['epochs']} epochs ({result['ended_by']}), {stages}"
            self._say(f"{place} {name}: {facts}")
        self._show(name)

    def lost(self, name: str, times: int, restarts: int) -> None:
        """Say that a run goes on after its process was lost."""
        rounds = f"{len(self.history[name])} of {rounds_of(self.runs[name])} rounds"
        self.console.print(f"restarted: {name}: its process was lost ({times}/{restarts}); it goes on after {rounds}")

    def fail(self, name: str, error: str) -> None:
        """Keep what made a run fail in its folder."""
        run = self.runs[name]
        with writing(run.folder.error):
            run.folder.error.write_text(error, encoding="utf-8", errors="backslashreplace")
        lines = error.strip().splitlines()
        self.failed[name] = lines[-1] if lines else "unknown error"
        self.console.print(f"failed: {name}: {self.failed[name]}")

    def _say(self, line: str) -> None:
        self.console.print(line)
        self.spoke = time.monotonic()

    def _show(self, what: str) -> None:
        self.bar.update(
            self.task,
            completed=self.done,
            description=f"{self.finished}/{self.total_runs} runs  {what}",
            eta=self.eta(),
        )

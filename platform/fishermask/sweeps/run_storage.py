"""The driver's files, for trials on any node: what a run has so far, and the journal of its picks."""

import time
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fishermask.results.files import RunFolder


class RunStorage:
    """Reads and writes run folders on the node that it lives on. All that matters of what it knows is in the files.

    Args:
        folders: the folder of each run, by the run's name.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.stages: dict[str, tuple[str, int, int]] = {}

    def report_progress(self, run: str, stage: str, done: int, total: int) -> None:
        """Note how far ``run`` is."""
        self.stages[run] = stage, done, total

    def pop_progress(self) -> dict[str, tuple[str, int, int]]:
        """What was told since it was last asked for, by run."""
        told, self.stages = self.stages, {}
        return told

    def history(self, run: str) -> list[dict[str, Any]]:
        """The rounds of ``run`` so far."""
        return RunFolder(self.folders[run]).history()

    def read(self, run: str, query: str) -> list[list[Any]]:
        """Journal entries of a query of ``run``."""
        return RunFolder(self.folders[run]).journal.read(query)

    def append(self, run: str, query: str, entries: list[list[Any]], first: int) -> None:
        """Add journal entries, which are those of the query from number ``first`` on."""
        RunFolder(self.folders[run]).journal.append(query, entries, first)


def start(folders: dict[str, Path]) -> Any:
    """A ``RunStorage`` as an actor beside this process, which writes ``rounds.jsonl`` there. It reserves nothing."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # It has no state and its entries are numbered, so it may start again and repeat what it was asked.
    again = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(RunStorage).options(scheduling_strategy=here, **again).remote(folders)


class StoredJournal:
    """The journal of one run, written by a ledger; satisfies ``experiment.journal.Journal``."""

    def __init__(self, storage: Any, run: str) -> None:
        self.storage, self.run = storage, run
        self._next = ("", 0)  # the query that was read last, and the number of its next entry

    def read(self, query: str) -> list[list[Any]]:
        entries: list[list[Any]] = ray.get(self.storage.read.remote(self.run, query))
        self._next = (query, len(entries))
        return entries

    def append(self, query: str, entries: list[list[Any]]) -> None:
        if self._next[0] != query:
            self.read(query)
        ray.get(self.storage.append.remote(self.run, query, entries, self._next[1]))
        self._next = (query, self._next[1] + len(entries))


class ProgressReporter:
    """Reports the progress of a run to a ``RunStorage``: each stage, and within a stage at most once a second."""

    def __init__(self, storage: Any, run: str) -> None:
        self.storage, self.run = storage, run
        self._stage, self._last = "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or time.monotonic() - self._last > 1.0:
            self.storage.report_progress.remote(self.run, stage, done, total)
            self._stage, self._last = stage, time.monotonic()

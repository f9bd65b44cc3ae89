"""Access to the driver's files for trials on any node: the finished rounds of a run and the journal of its picks."""

import time
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fishermask.results.files import RunFolder


class RunStorage:
    """Reads and writes the run folders on its node. Besides these files, it holds only the progress of each run.

    Args:
        folders: run folders by the name of the run.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.stages: dict[str, tuple[str, int, int]] = {}

    def report_progress(self, run: str, stage: str, done: int, total: int) -> None:
        """Set the current stage of ``run``."""
        self.stages[run] = stage, done, total

    def pop_progress(self) -> dict[str, tuple[str, int, int]]:
        """Return the stages that were reported since the last call, by run."""
        stages, self.stages = self.stages, {}
        return stages

    def history(self, run: str) -> list[dict[str, Any]]:
        """Return the finished rounds of ``run``."""
        return RunFolder(self.folders[run]).history()

    def read(self, run: str, query: str) -> list[list[Any]]:
        """Return the journal entries of a query of ``run``."""
        return RunFolder(self.folders[run]).journal.read(query)

    def append(self, run: str, query: str, entries: list[list[Any]], first: int) -> None:
        """Add journal entries of a query, from entry number ``first`` on."""
        RunFolder(self.folders[run]).journal.append(query, entries, first)


def start(folders: dict[str, Path]) -> Any:
    """Start a ``RunStorage`` as an actor on the node of this process. It reserves no resources."""
    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Ray may repeat a call after it restarts the actor. This is safe because journal entries are numbered.
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(RunStorage).options(scheduling_strategy=driver_node, **options).remote(folders)


class StoredJournal:
    """The journal of one run in a ``RunStorage`` actor; satisfies ``experiment.journal.Journal``."""

    def __init__(self, storage: Any, run: str) -> None:
        self.storage, self.run = storage, run
        self._next = ("", 0)  # the last query that was read, and the number of its next entry

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
    """Reports the progress of a run to a ``RunStorage`` actor: each stage, and within a stage at most once a second."""

    def __init__(self, storage: Any, run: str) -> None:
        self.storage, self.run = storage, run
        self._stage, self._last = "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or time.monotonic() - self._last > 1.0:
            self.storage.report_progress.remote(self.run, stage, done, total)
            self._stage, self._last = stage, time.monotonic()

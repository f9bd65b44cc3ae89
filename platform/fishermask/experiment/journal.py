"""The journal of a run: the picks of a query in progress, so that a killed selection resumes after its last pick."""

import time
from typing import Any, Protocol

from fishermask.data.ids import Ids
from fishermask.pool.pool import Rescore

WRITE_SECONDS = 1.0
"""Minimum time between two writes of picks."""


class Journal(Protocol):
    """The picks of one run's query in progress. An entry is a list of JSON values: ``[id, rescore]``.

    ``query`` names a round and contains a hash of the model and the labeled set, so that picks of another state are
    never used.
    """

    def read(self, query: str) -> list[list[Any]]:
        """Return the entries of ``query`` in order; later calls of ``append`` add entries after them."""

    def append(self, query: str, entries: list[list[Any]]) -> None:
        """Append entries to ``query``. When this method returns, the entries survive the loss of this process."""


class NoJournal:
    """A journal that stores nothing."""

    def read(self, query: str) -> list[list[Any]]:
        return []

    def append(self, query: str, entries: list[list[Any]]) -> None:
        pass


class QueryJournal:
    """The journal of one query. It converts the positions of the query to the ids of the journal, and back."""

    def __init__(self, journal: Journal, query: str, ids: Ids) -> None:
        self.journal, self.query, self.ids = journal, query, ids
        self.pending: list[list[Any]] = []
        self.last_write = time.monotonic()

    def past_picks(self) -> list[tuple[int, Rescore]]:
        """Return the picks that an earlier process made in this query."""
        entries = self.journal.read(self.query)
        positions = self.ids.positions([name for name, _ in entries]).tolist()
        return [(position, Rescore(value)) for position, (_, value) in zip(positions, entries, strict=True)]

    def add(self, position: int, rescore: Rescore) -> None:
        """Record a pick. The picks of the last second may be lost with the process."""
        self.pending.append([self.ids[position], int(rescore)])
        if time.monotonic() - self.last_write > WRITE_SECONDS:
            self.journal.append(self.query, self.pending)
            self.pending, self.last_write = [], time.monotonic()

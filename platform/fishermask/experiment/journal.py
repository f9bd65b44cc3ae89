"""Where the picks of a round under way are kept, so that a killed selection goes on where it was."""

from typing import Any, Protocol


class Journal(Protocol):
    """The picks of one run's query under way. An entry is a list of plain JSON values, such as ``[id, rescored]``.

    ``query`` names a round and what the query began with: picks of another model or pool are not its own.
    """

    def read(self, query: str) -> list[list[Any]]:
        """The entries of ``query`` so far, in order; an ``append`` after it goes on behind them."""

    def append(self, query: str, entries: list[list[Any]]) -> None:
        """Add entries to ``query``; they outlive this process once this returns."""


class NoJournal:
    """Keeps nothing."""

    def read(self, query: str) -> list[list[Any]]:
        return []

    def append(self, query: str, entries: list[list[Any]]) -> None:
        pass

"""Where the picks of a round under way are kept, so that a killed selection goes on where it was."""

from typing import Any, Protocol


class Journal(Protocol):
    """The picks of one run's current round. An entry is a list of plain JSON values, such as ``[id, rescored]``."""

    def read(self, round: int) -> list[list[Any]]:
        """The entries of ``round`` so far, in order; an ``append`` after it goes on behind them."""

    def append(self, round: int, entries: list[list[Any]]) -> None:
        """Add entries to ``round``; they outlive this process once this returns."""


class NoJournal:
    """Keeps nothing."""

    def read(self, round: int) -> list[list[Any]]:
        return []

    def append(self, round: int, entries: list[list[Any]]) -> None:
        pass

"""The result of ``fishermask.select``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 10
"""Maximum number of positions in the text of a selection."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The batch that a strategy selected, in the order of choice. Iteration yields the positions as integers.

    Attributes:
        positions: positions in the pool, int64 [budget]. They index tensors, NumPy arrays and data sets.
        gains: gain of each pick, float64 [budget]: the decrease of the objective, or the score of a strategy that
            chooses by distance. None for a strategy that does not choose by gain.
        objective_before: value of the objective before the first pick; None for a strategy without an objective.
        objective_after: value of the objective after the last pick.
        strategy: name of the strategy.
        notes: further facts about the query, such as the largest rounding error of a gain, by name.
        seconds: time of each stage of the query, by name.
    """

    positions: Tensor
    gains: Tensor | None
    objective_before: float | None
    objective_after: float | None
    strategy: str
    notes: Mapping[str, float]
    seconds: Mapping[str, float]

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[int]:
        return iter(self.positions.tolist())

    def to_frame(self) -> "pd.DataFrame":
        """Return a table with one row for each pick: ``position``, and ``gain`` where the strategy has gains."""
        import pandas as pd

        columns = {"position": self.positions.numpy()}
        if self.gains is not None:
            columns["gain"] = self.gains.numpy()
        return pd.DataFrame(columns).rename_axis("pick")

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.positions[:SHOWN].tolist()))
        more = ", ..." if len(self) > SHOWN else ""
        return f"Selection({self._summary()}: [{shown}{more}])"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._summary())}</p>{self.to_frame().to_html(max_rows=SHOWN)}"

    def _summary(self) -> str:
        text = f"{len(self)} positions by {self.strategy}"
        if self.objective_before is not None:
            text += f", objective {self.objective_before:.4g} -> {self.objective_after:.4g}"
        return f"{text}, {sum(self.seconds.values()):.2g} s"

"""What a strategy sees of the pool.

There is one index space: *positions* in the pool, 0 to ``size - 1``. Positions become ids where a person or a file sees
them, and nowhere before.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from fishermask.pool.blocks import CHUNKS, DIAGONAL_BATCH
from fishermask.pool.shards import Shards
from fishermask.tensors.contrasts import Weighting
from fishermask.tensors.embedding import Embedding
from fishermask.tensors.layout import SIZES, Layout, inspect
from fishermask.tensors.mask import Mask
from fishermask.tensors.precision import Precision
from fishermask.tensors.runtime import return_memory

PIECES = 20
"""Parts that a pass over the pool is called in, so that its progress can be shown."""

INSPECTED = sum(SIZES)
"""Images, spread over the pool, on which the layout of the trained model is verified."""

Progress = Callable[[str, int, int], None]
"""Told the stage, how much is done and how much there is."""


class Freshness(IntEnum):
    """Whether all scores were recomputed just before a pick."""

    KEPT = 0
    RESCORED = 1
    EXACT = 2
    """They were recomputed in float64, and stay in float64 for the rest of the query."""


@dataclass(frozen=True)
class Engine:
    """How a query is computed, none of which a strategy need know."""

    precision: Precision = Precision()
    drift: float = 1e-3
    """Relative error of a pick's gain beyond which all scores are computed anew."""
    chunk: int = CHUNKS[0]
    """Images differentiated at once."""
    diagonal_batch: int = DIAGONAL_BATCH
    """Images whose Fisher diagonal is computed at once."""
    past: list[tuple[int, Freshness]] = field(default_factory=list)
    """Picks of this query that an earlier process made: position, and whether scores were computed anew before it."""
    journal: Callable[[int, Freshness], None] = lambda position, freshness: None
    """Told each pick as it is made."""


class Pool:
    """The pool in one round, with the model trained on what is labeled so far.

    Attributes:
        candidates: positions that may be queried, ascending, [u].
        labeled: positions that are labeled, in the order of labeling, [l].
        labels: their labels, [l].
        generator: the strategy's own random stream of this round.
        model: the trained model, in eval mode.
        shards: the pool's shards, which hold the same model.
        notes: what is worth knowing of how the batch was found, by name.
        gains: gain of each pick in the order of choice, float64 [b]: the exact decrease of the objective, or the score
            of a strategy by distance (NaN for a pick replayed from a journal). With ``oversample``, the gains of the
            picks that remain. None for a strategy that does not choose by gain.
        objective: the objective before the first pick and after the last. None for a strategy that has none.
    """

    def __init__(
        self,
        shards: Shards,
        size: int,
        labeled: Tensor,
        labels: Tensor,
        model: nn.Module,
        generator: torch.Generator,
        sample_generator: torch.Generator,
        progress: Progress = lambda stage, done, total: None,
        engine: Engine | None = None,
    ) -> None:
        unlabeled = torch.ones(size, dtype=torch.bool)
        unlabeled[labeled] = False
        self.candidates = unlabeled.nonzero()[:, 0]
        self.labeled, self.labels = labeled, labels
        self.size, self.shards, self.model = size, shards, model
        self.generator, self.progress = generator, progress
        self._sample_generator = sample_generator
        self.engine = engine or Engine()
        self.notes: dict[str, float] = {}
        self.gains: Tensor | None = None
        self.objective: tuple[float, float] | None = None
        shards.call("set_model", model, self.engine.precision)

    @property
    def scores_type(self) -> torch.dtype:
        """The type that scores are kept in."""
        return self.engine.precision.scores or next(self.model.parameters()).dtype

    def note(self, name: str, value: float, combine: Callable[[float, float], float] = max) -> None:
        """Keep ``value`` under ``name``, combined with what is there already."""
        self.notes[name] = combine(self.notes[name], value) if name in self.notes else value

    def embed(self, mask: Mask, weighting: Weighting = "sqrt", top_classes: int | None = None) -> None:
        """Let the shards embed all images; see ``tensors.embedding.embed``."""
        self.in_pieces("embed", "embed", mask, weighting, top_classes, self.engine.chunk)

    def embeddings_at(self, positions: Tensor) -> list[Embedding]:
        """The embeddings of single images, which shards must hold, in the order of ``positions``."""
        found = {k: v for own in self.shards.call("embeddings_at", positions) for k, v in own.items()}
        return [found[position] for position in positions.tolist()]

    def probabilities(self) -> Tensor:
        """Predicted probabilities of the candidates, [u, C].

        Raises:
            FloatingPointError: the model's outputs are not finite.
        """
        shards = [list[Tensor]() for _ in range(self.shards.count)]
        for found in self.in_pieces("predict", "probabilities"):
            for parts, part in zip(shards, found, strict=True):
                parts.append(part)
        probabilities = torch.cat([part for parts in shards for part in parts if len(part)])[self.candidates]
        if not probabilities.isfinite().all():
            raise FloatingPointError(
                "the model predicts probabilities that are not finite; lower training.learning_rate"
            )
        return probabilities

    def layout(self) -> Layout:
        """How the model's parameters are differentiated."""
        some = torch.linspace(0, self.size - 1, INSPECTED).long().unique()
        layout = inspect(self.model, torch.cat(self.shards.call("inputs_at", some)))
        return_memory()
        return layout

    def sample(self, count: int) -> Tensor:
        """Positions of ``count`` images of the whole pool, or of all it has, drawn at random, ascending."""
        return torch.randperm(self.size, generator=self._sample_generator)[:count].sort().values

    def fisher_diagonal(self, layout: Layout, num_samples: int, which: str = "random") -> dict[str, Tensor]:
        """Mean Fisher diagonal of the parameters outside the last layer over a ``random`` sample of the whole pool.

        The paper's released code takes the ``first`` images instead.
        """
        sample = self.sample(num_samples) if which == "random" else torch.arange(min(num_samples, self.size))
        batches = torch.cat(self.shards.call("images_at", sample)).split(self.engine.diagonal_batch)
        total: dict[str, Tensor] = {}
        for first in range(0, len(batches), self.shards.count):
            self.progress("fisher diagonal", first, len(batches))
            args = [([batch], layout) for batch in batches[first : first + self.shards.count]]
            # Added batch by batch in the sample's order, whichever shard computed it.
            for diagonal in (d for found in self.shards.scatter("fisher_diagonals", args) for d in found):
                total = {name: total[name] + value if total else value for name, value in diagonal.items()}
        return {name: value / len(sample) for name, value in total.items()}

    def in_pieces(self, stage: str, method: str, *args: Any) -> list[list[Any]]:
        """Call a shard method that works in pieces with each piece in turn, reporting progress."""
        found = []
        for piece in range(PIECES):
            self.progress(stage, piece, PIECES)
            found.append(self.shards.call(method, *args, piece, PIECES))
        self.progress(stage, PIECES, PIECES)
        return found

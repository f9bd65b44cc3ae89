"""What a strategy sees of the pool.

There is one index space: *positions* in the pool, 0 to ``size - 1``. Positions become ids only in files and messages.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeVar, TypeVarTuple

import torch
from torch import Tensor, nn

from fishermask.pool.blocks import CHUNKS, DIAGONAL_BATCH
from fishermask.pool.shard import Shard
from fishermask.pool.shards import Shards
from fishermask.tensors.contrasts import Weighting
from fishermask.tensors.embedding import Embedding
from fishermask.tensors.gradient_plan import VERIFICATION_SIZES, GradientPlan, plan_gradients
from fishermask.tensors.mask import Mask
from fishermask.tensors.precision import Precision
from fishermask.tensors.runtime import return_memory

NUM_PIECES = 20
"""Number of calls that a pass over the pool is divided into, so that its progress can be shown."""

Progress = Callable[[str, int, int], None]
"""Receives the stage, the number of steps done and the number of steps in all."""

Result = TypeVar("Result")
Args = TypeVarTuple("Args")


class Rescore(IntEnum):
    """Whether all scores were recomputed just before a pick."""

    NONE = 0
    SAME_TYPE = 1
    FLOAT64 = 2
    """They were recomputed in float64, and stay in float64 for the rest of the query."""


@dataclass(frozen=True)
class Engine:
    """How a query is computed. Strategies need not know any of it."""

    precision: Precision = Precision()
    drift: float = 1e-3
    """Relative error of a pick's gain above which all scores are recomputed."""
    chunk: int = CHUNKS[0]
    """Number of images differentiated at once."""
    diagonal_batch: int = DIAGONAL_BATCH
    """Number of images whose Fisher diagonal is computed at once."""
    past_picks: list[tuple[int, Rescore]] = field(default_factory=list)
    """Picks of this query that an earlier process made: position, and whether scores were recomputed before it."""
    record_pick: Callable[[int, Rescore], None] = lambda position, rescore: None
    """Receives each pick when it is made."""


class Pool:
    """The pool in one round, with the model trained on the images labeled so far.

    Attributes:
        candidates: positions that may be queried, ascending, [u].
        labeled: positions that are labeled, in the order of labeling, [l].
        labels: their labels, [l].
        generator: the strategy's own random stream of this round.
        model: the trained model, in eval mode.
        shards: the pool's shards, which hold the same model.
        notes: figures about the query to record with the round, by name.
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
        shards.call(Shard.set_model, model, self.engine.precision)

    @property
    def scores_type(self) -> torch.dtype:
        """The data type of the scores."""
        return self.engine.precision.scores or next(self.model.parameters()).dtype

    def note(self, name: str, value: float, combine: Callable[[float, float], float] = max) -> None:
        """Record ``value`` in ``notes``, combined with an earlier value of that name."""
        self.notes[name] = combine(self.notes[name], value) if name in self.notes else value

    def store_embeddings(self, mask: Mask, weighting: Weighting = "sqrt", top_classes: int | None = None) -> None:
        """Let the shards embed all images and keep the embeddings; see ``tensors.embedding.embed``."""
        self.call_in_pieces("embed", Shard.store_embeddings, mask, weighting, top_classes, self.engine.chunk)

    def embeddings_at(self, positions: Tensor) -> list[Embedding]:
        """Return the stored embeddings of single images, in the order of ``positions``."""
        by_position = {k: v for part in self.shards.call(Shard.embeddings_at, positions) for k, v in part.items()}
        return [by_position[position] for position in positions.tolist()]

    def free_embeddings(self) -> None:
        """Let the shards free their embeddings and scores."""
        self.shards.call(Shard.clear)

    def probabilities(self) -> Tensor:
        """Return the predicted probabilities of the candidates, [u, C].

        Raises:
            FloatingPointError: the model's outputs are not finite.
        """
        pieces = self.call_in_pieces("predict", Shard.probabilities)
        by_shard = [part for shard_parts in zip(*pieces, strict=True) for part in shard_parts if len(part)]
        probabilities = torch.cat(by_shard)[self.candidates]
        if not probabilities.isfinite().all():
            raise FloatingPointError(
                "the model predicts probabilities that are not finite; lower training.learning_rate"
            )
        return probabilities

    def plan_gradients(self) -> GradientPlan:
        """Return how to differentiate the model by its parameters, verified on images spread over the pool."""
        positions = torch.linspace(0, self.size - 1, sum(VERIFICATION_SIZES)).long().unique()
        plan = plan_gradients(self.model, torch.cat(self.shards.call(Shard.inputs_at, positions)))
        return_memory()
        return plan

    def sample(self, count: int) -> Tensor:
        """Return the positions of ``count`` random images of the whole pool, at most all of them, ascending."""
        return torch.randperm(self.size, generator=self._sample_generator)[:count].sort().values

    def fisher_diagonal(self, plan: GradientPlan, num_samples: int, which: str = "random") -> dict[str, Tensor]:
        """Return the mean Fisher diagonal of the body's parameters over a ``random`` sample of the whole pool.

        The paper's released code takes the ``first`` images instead.
        """
        sample = self.sample(num_samples) if which == "random" else torch.arange(min(num_samples, self.size))
        batches = torch.cat(self.shards.call(Shard.images_at, sample)).split(self.engine.diagonal_batch)
        total: dict[str, Tensor] = {}
        for first in range(0, len(batches), self.shards.count):
            self.progress("fisher diagonal", first, len(batches))
            args = [(batch, plan) for batch in batches[first : first + self.shards.count]]
            # The sum is taken batch by batch in the sample's order, whichever shard computed a batch.
            for diagonal in self.shards.scatter(Shard.fisher_diagonal, args):
                total = {name: total[name] + value if total else value for name, value in diagonal.items()}
        return {name: value / len(sample) for name, value in total.items()}

    def call_in_pieces(
        self, stage: str, method: Callable[[Shard, int, int, *Args], Result], *args: *Args
    ) -> list[list[Result]]:
        """Call ``method`` on all shards with each piece in turn, and report progress.

        Args:
            method: takes the index of a piece of the shard's slice and the number of pieces, then ``args``.

        Returns:
            For each piece, the results of the shards in order.
        """
        results = []
        for piece in range(NUM_PIECES):
            self.progress(stage, piece, NUM_PIECES)
            results.append(self.shards.call(method, piece, NUM_PIECES, *args))
        self.progress(stage, NUM_PIECES, NUM_PIECES)
        return results

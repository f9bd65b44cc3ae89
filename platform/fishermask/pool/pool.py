"""The pool as strategies use it.

Strategies work with *positions*, the indices 0 to ``size - 1`` in the pool. Only files and messages contain ids.
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
"""Number of calls per shard in a pass over the pool; progress is reported after each call."""

Progress = Callable[[str, int, int], None]
"""Function that receives the stage, the number of finished steps, and the total number of steps."""

Result = TypeVar("Result")
Args = TypeVarTuple("Args")


class Rescore(IntEnum):
    """Whether all scores were recomputed just before a pick."""

    NONE = 0
    SAME_TYPE = 1
    """Scores were recomputed in their data type."""
    FLOAT64 = 2
    """Scores were recomputed in float64, and stay in float64 for the rest of the query."""


@dataclass(frozen=True)
class Engine:
    """Settings of the computation of a query; strategies do not need them."""

    precision: Precision = Precision()
    drift: float = 1e-3
    """Scores are recomputed if the relative error of the gain of a pick exceeds this limit."""
    chunk: int = CHUNKS[0]
    """Number of images differentiated at once."""
    diagonal_batch: int = DIAGONAL_BATCH
    """Number of images whose Fisher diagonal is computed at once."""
    past_picks: list[tuple[int, Rescore]] = field(default_factory=list)
    """Picks of this query that an earlier process made: positions, and whether scores were recomputed before each."""
    record_pick: Callable[[int, Rescore], None] = lambda position, rescore: None
    """Function that receives each pick when it is made."""


class Pool:
    """The pool in one round, with the model trained on the images labeled so far.

    Your own strategy may use ``candidates``, ``labeled``, ``labels``, ``generator``, ``model``, ``size``, ``notes``,
    ``note()`` and ``probabilities()``. The other attributes and methods are for the strategies of fishermask, and may
    change in any release.

    Attributes:
        size: number of images in the pool, n.
        candidates: positions that may be queried, ascending, [n - n_L].
        labeled: positions that are labeled, in the order of labeling, [n_L].
        labels: labels of the labeled positions, [n_L].
        generator: random stream of the strategy in this round.
        model: the trained model, in eval mode.
        shards: shards of the pool, which hold copies of the model.
        notes: numbers about the query, by name; they are recorded with the round.
        gains: gain of each pick of the batch in the order of choice, float64 [b]; None for a strategy that does not
            choose by gain. For a trace objective, the gain is the exact decrease of the objective. For a strategy by
            distance, it is the score (NaN for a pick replayed from a journal).
        objective: the objective before the first and after the last pick; None for a strategy without an objective.
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
        gradient_plan: GradientPlan | None = None,
    ) -> None:
        unlabeled = torch.ones(size, dtype=torch.bool)
        unlabeled[labeled] = False
        self.candidates = unlabeled.nonzero()[:, 0]
        self.labeled, self.labels = labeled.clone(), labels.clone()  # a strategy may write to them
        self.size, self.shards, self.model = size, shards, model
        self.generator, self.progress = generator, progress
        self._sample_generator, self._gradient_plan = sample_generator, gradient_plan
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
        """Let the shards compute and store the embeddings of all images; see ``tensors.embedding.embed``."""
        self.call_in_pieces("embed", Shard.store_embeddings, mask, weighting, top_classes, self.engine.chunk)

    def embeddings_at(self, positions: Tensor) -> list[Embedding]:
        """Return the stored embedding of each image, in the order of ``positions``."""
        by_position = {k: v for part in self.shards.call(Shard.embeddings_at, positions) for k, v in part.items()}
        return [by_position[position] for position in positions.tolist()]

    def free_embeddings(self) -> None:
        """Let the shards free their embeddings and scores."""
        self.shards.call(Shard.clear)

    def probabilities(self) -> Tensor:
        """Return the predicted probabilities of the candidates, [n - n_L, C].

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
        """Return how to compute the gradients of the model, verified on images spread over the pool.

        If the pool was created with a gradient plan, the model has been verified on these images already.
        """
        if self._gradient_plan is not None:
            return self._gradient_plan
        positions = torch.linspace(0, self.size - 1, sum(VERIFICATION_SIZES)).long().unique()
        plan = plan_gradients(self.model, torch.cat(self.shards.call(Shard.inputs_at, positions)))
        return_memory()
        return plan

    def sample(self, count: int) -> Tensor:
        """Return the positions of ``count`` random images of the pool, or of all images if it has fewer, ascending."""
        return torch.randperm(self.size, generator=self._sample_generator)[:count].sort().values

    def fisher_diagonal(self, plan: GradientPlan, num_samples: int, which: str = "random") -> dict[str, Tensor]:
        """Return the mean Fisher diagonal over a sample of the pool: body parameter -> flat tensor.

        Args:
            which: ``random`` for random images, ``first`` for the first images, as in the paper's released code.
        """
        sample = self.sample(num_samples) if which == "random" else torch.arange(min(num_samples, self.size))
        batches = torch.cat(self.shards.call(Shard.images_at, sample)).split(self.engine.diagonal_batch)
        total: dict[str, Tensor] = {}
        for first in range(0, len(batches), self.shards.count):
            self.progress("fisher diagonal", first, len(batches))
            args = [(batch, plan) for batch in batches[first : first + self.shards.count]]
            # Batches are added in the order of the sample, so the sum does not depend on the number of shards.
            for diagonal in self.shards.scatter(Shard.fisher_diagonal, args):
                total = {name: total[name] + value if total else value for name, value in diagonal.items()}
        return {name: value / len(sample) for name, value in total.items()}

    def call_in_pieces(
        self, stage: str, method: Callable[[Shard, int, int, *Args], Result], *args: *Args
    ) -> list[list[Result]]:
        """Call ``method`` on all shards once for each piece of their slices, and report progress.

        Args:
            method: method of ``Shard`` that takes the index of a piece, the number of pieces, and ``args``.

        Returns:
            For each piece, the results of the shards in order.
        """
        results = []
        for piece in range(NUM_PIECES):
            self.progress(stage, piece, NUM_PIECES)
            results.append(self.shards.call(method, piece, NUM_PIECES, *args))
        self.progress(stage, NUM_PIECES, NUM_PIECES)
        return results

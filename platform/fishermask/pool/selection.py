"""Greedy batch selection over shards.

In each step, every shard returns its best candidate, and the coordinator picks the best of them. It then broadcasts the
update of the scores to all shards.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fishermask.pool.blocks import NARROW
from fishermask.pool.pool import Pool, Rescore
from fishermask.pool.shard import ScoredCandidate, Scorer, Shard, to_type
from fishermask.tensors import contrasts
from fishermask.tensors.approximation import relative_error, sample_size
from fishermask.tensors.contrasts import Weighting
from fishermask.tensors.embedding import Embedding, add_identity, concatenate, take
from fishermask.tensors.mask import Mask
from fishermask.tensors.trace import Objective, TraceScorer, Update, gains, initial_scores, update_scores

TOO_SMALL = "strategy.params.damping: too small for the information matrix to be inverted; raise it"
MIN_RESCORE_INTERVAL = 16
"""Smallest number of picks between two rescores because of errors of the gains."""
MAX_RESCORE_INTERVAL = 256
"""Largest number of picks between two rescores. It limits the work that a lost shard or a resumed query repeats."""
IMPRECISE = 10
"""If a gain error exceeds this many times ``Engine.drift`` fewer than ``MIN_RESCORE_INTERVAL`` picks after a rescore,
float32 is too imprecise."""
MAX_FLOAT64_ERROR = 0.1
"""If a gain error exceeds this limit immediately after a rescore in float64, M is nearly singular."""
NEGLIGIBLE = 1e-9
"""The relative error of a gain is computed with at least this share of the objective as the divisor."""


class Criterion(Protocol):
    """The gain that a greedy strategy maximizes in each step. Shards compute it with a ``Scorer``."""

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the scores and of everything that they are computed from."""

    def scorer(self) -> Scorer:
        """Return the scorer for the picks so far."""

    def use_float64(self) -> bool:
        """Change the scores to float64. Return whether this changed their type."""

    def gain_error(self, candidate: ScoredCandidate) -> float | None:
        """Return the relative error of the gain of ``candidate``; None if gains have no error.

        Without errors, scores are never recomputed.
        """

    def add(self, candidate: ScoredCandidate) -> tuple[float, Any]:
        """Add ``candidate`` to the picks. Return its gain and the update of all scores."""


def greedy(pool: Pool, criterion: Criterion, budget: int) -> list[ScoredCandidate]:
    """Return ``budget`` picks, each the candidate with the largest gain; ties go to the lowest position.

    The shards must hold embeddings. Picks of ``Engine.past_picks`` are replayed first. Section 7 of docs/method.md says
    when scores are recomputed (rescored), and when they change to float64.

    Raises:
        FloatingPointError: gains are too imprecise even in float64.
    """
    picks, last_rescore, candidates = _replay(pool, criterion)
    rescore, limit = Rescore.SAME_TYPE, pool.engine.drift
    while len(picks) < budget:
        best = best_candidate(candidates)
        error, age = criterion.gain_error(best), len(picks) - last_rescore
        if error is not None:
            # ``not error <= limit`` is true for NaN.
            imprecise = (age == 0 and not error <= limit) or (
                age < MIN_RESCORE_INTERVAL and not error <= IMPRECISE * limit
            )
            to_float64 = imprecise and criterion.use_float64()
            if not to_float64 and age == 0 and not error <= MAX_FLOAT64_ERROR:
                raise FloatingPointError(TOO_SMALL)
            if to_float64 or age >= MAX_RESCORE_INTERVAL or (age >= MIN_RESCORE_INTERVAL and error > limit):
                rescore = Rescore.FLOAT64 if to_float64 else Rescore.SAME_TYPE
                if to_float64:
                    pool.note("picks before float64", float(len(picks)))
                pool.note("largest gain error before a rescore", error, max)
                pool.note("rescores", 1.0, float.__add__)
                candidates, last_rescore = _start(pool, criterion, picks), len(picks)
                continue
            pool.note("largest gain error", error, max)
        gain, update = criterion.add(best)
        picks.append(best._replace(gain=gain))
        pool.engine.record_pick(best.position, rescore if last_rescore == len(picks) - 1 else Rescore.NONE)
        pool.progress("pick", len(picks), budget)
        if len(picks) < budget:
            candidates = pool.shards.call(Shard.apply_pick, update, best.position, True)
    return picks


def _start(pool: Pool, criterion: Criterion, picks: list[ScoredCandidate]) -> list[ScoredCandidate | None]:
    """Let the shards compute all scores after ``picks``. Return the best candidate of each shard."""
    picked = torch.tensor([pick.position for pick in picks], dtype=torch.long)
    remaining = pool.candidates[~torch.isin(pool.candidates, picked)]
    return pool.shards.call(Shard.start_selection, criterion.scorer(), remaining, len(picks), criterion.dtype)


def _replay(pool: Pool, criterion: Criterion) -> tuple[list[ScoredCandidate], int, list[ScoredCandidate | None]]:
    """Replay ``Engine.past_picks``, equal to the last bit.

    Returns:
        The picks, the number of picks before the last rescore, and the best candidate of each shard.
    """
    positions = [position for position, _ in pool.engine.past_picks]
    rescores = [rescore for _, rescore in pool.engine.past_picks]
    embeddings = pool.embeddings_at(torch.tensor(positions, dtype=torch.long))
    picks = [ScoredCandidate(math.nan, *pair) for pair in zip(positions, embeddings, strict=True)]
    last_rescore = max((i for i, rescore in enumerate(rescores) if rescore != Rescore.NONE), default=0)
    for i, pick in enumerate(picks[:last_rescore]):
        if rescores[i] != Rescore.NONE:
            criterion.scorer()  # it may apply pending terms, whose rounding must be repeated
        picks[i] = pick._replace(gain=criterion.add(pick)[0])
    if Rescore.FLOAT64 in rescores:
        criterion.use_float64()
    candidates = _start(pool, criterion, picks[:last_rescore])
    for i, pick in enumerate(picks[last_rescore:], start=last_rescore):
        gain, update = criterion.add(pick)
        picks[i] = pick._replace(gain=gain)
        candidates = pool.shards.call(Shard.apply_pick, update, pick.position, i + 1 == len(picks))
        pool.progress("replay picks", i + 1, len(picks))
    return picks, last_rescore, candidates


def best_candidate(candidates: list[ScoredCandidate | None]) -> ScoredCandidate:
    """Return the candidate with the largest gain; of equal gains, the one at the lowest position."""
    return max(
        (candidate for candidate in candidates if candidate is not None),
        key=lambda candidate: (candidate.gain, -candidate.position),
    )


def record_picks(pool: Pool, picks: list[ScoredCandidate]) -> Tensor:
    """Record the gains of ``picks`` in ``pool.gains`` and return their positions, [b]."""
    pool.gains = torch.tensor([pick.gain for pick in picks], dtype=torch.float64)
    return torch.tensor([pick.position for pick in picks])


@dataclass(frozen=True)
class DistanceCriterion:
    """Gain by distance to the nearest center. Such gains do not accumulate errors."""

    distance_scorer: Scorer
    dtype: torch.dtype
    """Data type of the scores."""

    def scorer(self) -> Scorer:
        return self.distance_scorer

    def use_float64(self) -> bool:
        return False

    def gain_error(self, candidate: ScoredCandidate) -> None:
        return None

    def add(self, candidate: ScoredCandidate) -> tuple[float, Embedding]:
        return candidate.gain, candidate.embedding


@dataclass
class TraceCriterion:
    """Gain by the decrease of ``tr(M^-1 F)``."""

    objective: Objective
    dtype: torch.dtype
    """Data type of the scores."""
    _considered: tuple[int, Update] | None = None
    """Position of the last candidate of ``gain_error``, and its update."""

    def scorer(self) -> TraceScorer:
        return TraceScorer(*self.objective.matrices(self.dtype))

    def use_float64(self) -> bool:
        changed = self.dtype != torch.float64
        self.dtype = torch.float64
        return changed

    def gain_error(self, candidate: ScoredCandidate) -> float:
        # The update contains the exact gain. It is stored because ``add`` nearly always needs it next.
        update = self.objective.consider(candidate.embedding)
        self._considered = candidate.position, update
        # If a gain is negligible compared with the objective, its relative error has no meaning.
        smallest = max(NEGLIGIBLE * abs(self.objective.value), 1e-300)
        return abs(candidate.gain - update.gain) / max(abs(update.gain), smallest)

    def add(self, candidate: ScoredCandidate) -> tuple[float, Update]:
        if self._considered is not None and self._considered[0] == candidate.position:
            update = self._considered[1]
        else:
            update = self.objective.consider(candidate.embedding)
        self.objective.apply(update)
        self._considered = None
        return update.gain, to_type(update, self.dtype)


@dataclass(frozen=True)
class TraceOptions:
    """Definition of M and F in ``tr(M^-1 F)``. The defaults are BAIT's (Ash et al. 2021) without oversampling."""

    damping: float = 1.0
    """lambda: M includes lambda times the identity."""
    initial_information: bool = True
    """Whether M includes the information of the labeled images."""
    class_weighting: Weighting = "sqrt"
    """``sqrt``: V^T V is the Fisher information. ``none``: all classes have the same weight."""
    top_classes: int | None = None
    """q: an approximation that uses only the q most probable classes of each image, renormalized."""
    batch_weighting: Literal["bait", "per_sample"] = "bait"
    """w, the weight of a picked image in M. ``bait``: b, as in BAIT's code. ``per_sample``: 1, like a labeled image."""
    target: Literal["pool", "identity"] = "pool"
    """F. ``pool``: the mean information of the pool. ``identity``: the identity (A-optimal design)."""
    oversample: float = 1.0
    """Number of picks divided by the budget. The picks beyond the budget that contribute least are pruned."""


def minimize_trace(pool: Pool, mask: Mask, budget: int, options: TraceOptions) -> Tensor:
    """Return ``budget`` candidates, in the order of choice, that greedily minimize ``tr(M^-1 F)`` (Ash et al. 2021).

    Raises:
        FloatingPointError: the information is not finite, or ``damping`` is too small for float64.
    """
    pool.store_embeddings(mask, options.class_weighting, options.top_classes)
    objective = initial_objective(pool, budget, options)
    before = objective.value
    count = min(len(pool.candidates), math.ceil(options.oversample * budget))
    picks = greedy(pool, TraceCriterion(objective, pool.scores_type), count)
    if options.top_classes is not None:
        pool.note("relative error of top_classes", approximation_error(pool, mask, options))
    pool.free_embeddings()
    if count > budget:
        objective, picks = _prune(pool, objective, picks, budget)
    if objective.value < 0:
        raise FloatingPointError(TOO_SMALL)
    pool.note("objective", objective.value)
    pool.objective = before, objective.value
    return record_picks(pool, picks)


def _prune(
    pool: Pool, objective: Objective, picks: list[ScoredCandidate], budget: int
) -> tuple[Objective, list[ScoredCandidate]]:
    """Prune, one by one, the pick whose removal raises the objective least, until ``budget`` picks remain.

    Pruning prefers directions in which M is nearly singular, and errors grow with every pruned pick. So the objective
    and the scores are computed in float64. They are recomputed from the remaining picks when the estimated error of the
    objective exceeds ``Engine.drift``, and the objective is recomputed at the end.
    """
    count = len(picks)
    embedding = concatenate([pick.embedding for pick in picks]).to(torch.float64)
    scores = initial_scores(embedding, *objective.matrices())
    while len(picks) > budget:
        pool.progress("prune", count - len(picks), count - budget)
        index = least_contributing(scores)
        update = objective.remove(take(embedding, slice(index, index + 1)))
        update_scores(scores, embedding, update)
        remaining = torch.arange(len(picks)) != index
        embedding = take(embedding, remaining).map(Tensor.contiguous)
        scores = scores[..., remaining].contiguous()
        picks = picks[:index] + picks[index + 1 :]
        if len(picks) == budget or objective.error(embedding) > pool.engine.drift:
            before = objective.value
            try:
                objective = objective.rebuild(embedding)
            except torch.linalg.LinAlgError:
                raise FloatingPointError(TOO_SMALL) from None
            if not objective.error(embedding) <= MAX_FLOAT64_ERROR:
                raise FloatingPointError(TOO_SMALL)
            error = abs(before - objective.value) / max(abs(objective.value), 1e-300)
            pool.note("largest objective error", error)
            if len(picks) > budget:
                pool.note("objective recomputations", 1.0, float.__add__)
                scores = initial_scores(embedding, *objective.matrices())
    return objective, picks


def least_contributing(scores: Tensor) -> int:
    """Return the index of the image whose removal raises the trace least, by ``tr((I - P)^-1 Q)``."""
    return int(gains(torch.stack([-scores[0], scores[1]])).argmin())


def approximation_error(pool: Pool, mask: Mask, options: TraceOptions) -> float:
    """Return the relative error of ``tr((lambda I + F)^-1 F)`` that ``top_classes`` causes, with F of a sample.

    The shards must hold the approximate embeddings.
    """
    (first_embedding,) = pool.embeddings_at(torch.zeros(1, dtype=torch.long))
    sample = pool.sample(sample_size(contrasts.num_rows(first_embedding.num_classes, options.class_weighting)))
    images = torch.cat(pool.shards.call(Shard.images_at, sample))
    (exact,) = pool.shards.scatter(Shard.embed_images, [(images, mask, options.class_weighting)])
    return relative_error(exact, concatenate(pool.embeddings_at(sample)), options.damping)


def initial_objective(pool: Pool, budget: int, options: TraceOptions = TraceOptions()) -> Objective:  # noqa: B008  frozen
    """Return the objective before any pick; the shards must hold embeddings.

    Raises:
        FloatingPointError: the information is not finite, or M cannot be inverted.
    """
    pool.progress("information", 0, 1)
    largest = pool.shards.call(Shard.largest_information)
    if not all(map(math.isfinite, largest)):
        raise FloatingPointError(
            "the Fisher information of the pool is not finite, because outputs of the model overflow; "
            "lower training.learning_rate"
        )
    # A sum over parts is at most the number of parts times the largest entry of a part, and must fit into 62 bits.
    num_parts = -(-pool.size // NARROW)
    quantum = 2.0 ** (math.ceil(math.log2(max(*largest, 1e-200) * num_parts)) - 62)
    total = len(pool.labeled) + budget
    (first_embedding,) = pool.embeddings_at(torch.zeros(1, dtype=torch.long))
    sums = pool.shards.sum_results(Shard.information, pool.labeled, quantum)
    pool_information, labeled_information = (part.double() for part in sums)
    target = pool_information.mul_(quantum / pool.size)
    sizes = first_embedding.num_classes, len(first_embedding.hidden)
    if options.target == "identity":
        add_identity(target.zero_(), 1.0, *sizes)
    start = labeled_information.mul_(quantum / total if options.initial_information else 0.0)
    add_identity(start, options.damping, *sizes)
    weight = budget if options.batch_weighting == "bait" else 1
    # The trace with the identity as F includes the E directions that no embedding reaches.
    constant = len(first_embedding.hidden) / options.damping if options.target == "identity" else 0.0
    try:
        return Objective(start, target, math.sqrt(weight / total), constant, options.oversample > 1)
    except torch.linalg.LinAlgError:
        raise FloatingPointError(TOO_SMALL) from None

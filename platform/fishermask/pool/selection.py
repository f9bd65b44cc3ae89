"""The greedy loop over shards: ask each for its best candidate, take the best of those, tell all what it changed."""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fishermask.pool.blocks import NARROW
from fishermask.pool.pool import Freshness, Pool
from fishermask.pool.shard import Offer, Scorer, moved
from fishermask.tensors import contrasts
from fishermask.tensors.approximation import relative_error, sample_size
from fishermask.tensors.contrasts import Weighting
from fishermask.tensors.embedding import Embedding, add_identity, concatenate, take
from fishermask.tensors.mask import Mask
from fishermask.tensors.trace import Objective, TraceScorer, Update, advance, gains, start_scores

TOO_SMALL = "strategy.params.damping: too small for the information matrix to be inverted; raise it"
RESCORE_AFTER = 16
"""Picks between two times that all scores are computed anew because they drifted."""
LARGE = 10
"""A drift of this many times ``Engine.drift`` within ``RESCORE_AFTER`` picks shows that float32 is too imprecise."""
MAX_EXACT_DRIFT = 0.1
"""Largest drift of a gain right after scores were computed in float64; beyond it the matrix is nearly singular."""
NEGLIGIBLE = 1e-9
"""Gains below this share of the trace are treated as zero when their relative error is computed."""
RESCORE_EVERY = 256
"""Picks after which they are in any case: what has to be repeated when a shard or a selection is lost is bounded."""


class Criterion(Protocol):
    """What a greedy strategy knows of all picks so far; the shards' part of it is its ``Scorer``."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the shards' scores, and of all that they are told."""

    def scorer(self) -> Scorer:
        """What shards compute scores from that know of all picks so far."""

    def use_float64(self) -> bool:
        """Let scores be float64 from now on; False if they are already, or none can be."""

    def drift(self, offer: Offer) -> float | None:
        """Relative error of the gain that a shard found for ``offer``; None if none can arise.

        Where none can, ``scorer`` is asked for before the first pick only.
        """

    def add(self, offer: Offer) -> tuple[float, Any]:
        """Add ``offer`` to the picks. Return its gain, exact where it can be, and the update of all shards' scores."""


def greedy(pool: Pool, criterion: Criterion, budget: int) -> list[Offer]:
    """``budget`` picks, each the candidate with the largest gain; ties go to the lowest position.

    The shards must hold embeddings. Scores are computed anew when they have drifted by more than ``Engine.drift`` of a
    gain, and every ``RESCORE_EVERY`` picks; in float64 from then on if float32 cannot hold them: when a gain is off as
    soon as scores are fresh, or far off a few picks later. Picks that the pool's journal holds are taken as they are.
    """
    chosen, fresh, offers = _replay(pool, criterion)
    latest, limit = Freshness.RESCORED, pool.engine.drift
    while len(chosen) < budget:
        best = best_offer(offers)
        drift, age = criterion.drift(best), len(chosen) - fresh
        if drift is not None:
            imprecise = (age == 0 and not drift <= limit) or (age < RESCORE_AFTER and not drift <= LARGE * limit)
            exact = imprecise and criterion.use_float64()
            if not exact and age == 0 and not drift <= MAX_EXACT_DRIFT:
                raise FloatingPointError(TOO_SMALL)
            if exact or age >= RESCORE_EVERY or (age >= RESCORE_AFTER and drift > limit):
                latest = Freshness.EXACT if exact else Freshness.RESCORED
                if exact:
                    pool.note("picks before scores were kept in float64", float(len(chosen)))
                pool.note("largest drift of a gain before scores were computed anew", drift, max)
                pool.note("times scores were computed anew", 1.0, float.__add__)
                offers, fresh = _start(pool, criterion, chosen), len(chosen)
                continue
            pool.note("largest drift of a gain", drift, max)
        gain, change = criterion.add(best)
        chosen.append(best._replace(gain=gain))
        pool.engine.journal(best.position, latest if fresh == len(chosen) - 1 else Freshness.KEPT)
        pool.progress("pick", len(chosen), budget)
        if len(chosen) < budget:
            offers = pool.shards.call("advance", change, best.position)
    return chosen


def _start(pool: Pool, criterion: Criterion, chosen: list[Offer]) -> list[Offer | None]:
    taken = torch.tensor([offer.position for offer in chosen], dtype=torch.long)
    left = pool.candidates[~torch.isin(pool.candidates, taken)]
    return pool.shards.call("start_selection", criterion.scorer(), left, len(chosen), criterion.dtype)


def _replay(pool: Pool, criterion: Criterion) -> tuple[list[Offer], int, list[Offer | None]]:
    """What the journal's picks come to: the picks, how many there were when scores were last computed, new offers."""
    positions = [position for position, _ in pool.engine.past]
    embeddings = pool.embeddings_at(torch.tensor(positions, dtype=torch.long))
    past = [Offer(math.nan, *pick) for pick in zip(positions, embeddings, strict=True)]
    freshness = [freshness for _, freshness in pool.engine.past]
    fresh = max((i for i, value in enumerate(freshness) if value != Freshness.KEPT), default=0)
    for i, offer in enumerate(past[:fresh]):
        if freshness[i] != Freshness.KEPT:
            criterion.scorer()  # it may gather what came before, which rounds: do all that was done then
        past[i] = offer._replace(gain=criterion.add(offer)[0])
    if Freshness.EXACT in freshness:
        criterion.use_float64()
    offers = _start(pool, criterion, past[:fresh])
    for i, offer in enumerate(past[fresh:], start=fresh):
        gain, change = criterion.add(offer)
        past[i] = offer._replace(gain=gain)
        offers = pool.shards.call("advance", change, offer.position, i + 1 == len(past))
        pool.progress("repeat picks", i + 1, len(past))
    return past, fresh, offers


def best_offer(offers: list[Offer | None]) -> Offer:
    """The offer with the largest gain; of equal ones the lowest position."""
    return max((offer for offer in offers if offer is not None), key=lambda offer: (offer.gain, -offer.position))


@dataclass(frozen=True)
class TraceOptions:
    """How ``tr(M^-1 F)`` is set up. The defaults are BAIT's (Ash et al. 2021) without oversampling."""

    damping: float = 1.0
    """lambda: M begins as lambda times the identity ..."""
    initial_information: bool = True
    """... plus the labeled images' share of the information."""
    class_weighting: Weighting = "sqrt"
    """With sqrt, V^T V is the Fisher information; with none, classes count alike, however probable."""
    top_classes: int | None = None
    """q: an approximation that keeps the q most probable classes of each image, renormalized."""
    batch_weighting: Literal["bait", "per_sample"] = "bait"
    """A candidate counts K / (nL + K), as BAIT's code has it, or 1 / (nL + K), as a labeled image does."""
    target: Literal["pool", "identity"] = "pool"
    """F: the mean information of the whole pool, or the identity (A-optimal design)."""
    oversample: float = 1.0
    """r: choose r times the budget, then take back, one by one, what is missed least."""


@dataclass(frozen=True)
class DistanceCriterion:
    """Scores by distance to the nearest pick: a pick changes them as it is, and nothing adds up."""

    first: Scorer
    dtype: torch.dtype
    """Type of the shards' scores."""

    def scorer(self) -> Scorer:
        return self.first

    def use_float64(self) -> bool:
        return False

    def drift(self, offer: Offer) -> None:
        return None

    def add(self, offer: Offer) -> tuple[float, Embedding]:
        return offer.gain, offer.embedding


@dataclass
class TraceCriterion:
    """Minimize ``tr(M^-1 F)``."""

    objective: Objective
    dtype: torch.dtype
    """Type of the shards' scores."""
    _asked: tuple[int, Update] | None = None

    def scorer(self) -> TraceScorer:
        return TraceScorer(*self.objective.matrices(self.dtype))

    def use_float64(self) -> bool:
        wider = self.dtype != torch.float64
        self.dtype = torch.float64
        return wider

    def drift(self, offer: Offer) -> float:
        # What is needed to know the exact gain is all that is needed to take the offer.
        update = self.objective.consider(offer.embedding)
        self._asked = offer.position, update
        # The relative error of a gain that is negligible against the trace means nothing.
        least = max(NEGLIGIBLE * abs(self.objective.value), 1e-300)
        return abs(offer.gain - update.gain) / max(abs(update.gain), least)

    def add(self, offer: Offer) -> tuple[float, Update]:
        known = self._asked is not None and self._asked[0] == offer.position
        update = self._asked[1] if known and self._asked else self.objective.consider(offer.embedding)
        self.objective.apply(update)
        self._asked = None
        return update.gain, moved(update, self.dtype)


def minimize_trace(pool: Pool, mask: Mask, budget: int, options: TraceOptions) -> Tensor:
    """``budget`` candidates, in the order of choice, that greedily minimize ``tr(M^-1 F)`` (Ash et al. 2021).

    Raises:
        FloatingPointError: the information is not finite, or rounding decides what is left of the trace.
    """
    pool.embed(mask, options.class_weighting, options.top_classes)
    objective = objective_of(pool, budget, options)
    before = objective.value
    count = min(len(pool.candidates), math.ceil(options.oversample * budget))
    chosen = greedy(pool, TraceCriterion(objective, pool.scores_type), count)
    if options.top_classes is not None:
        pool.note(
            "relative error of the objective by top_classes, on a sample", approximation_error(pool, mask, options)
        )
    pool.shards.call("clear")
    if count > budget:
        objective, chosen = _prune(pool, objective, chosen, budget)
    if objective.value < 0:
        raise FloatingPointError(TOO_SMALL)
    pool.note("objective", objective.value)
    pool.objective = before, objective.value
    return record_picks(pool, chosen)


def record_picks(pool: Pool, picks: list[Offer]) -> Tensor:
    """Record the gains of ``picks`` in ``pool`` and return their positions, [b]."""
    pool.gains = torch.tensor([pick.gain for pick in picks], dtype=torch.float64)
    return torch.tensor([pick.position for pick in picks])


def _prune(pool: Pool, objective: Objective, chosen: list[Offer], budget: int) -> tuple[Objective, list[Offer]]:
    """Take images back, one by one, whose loss raises the trace the least, until ``budget`` are left.

    Taking an image back looks for directions in which M has next to nothing left, and errors grow with every one that
    is taken. So everything is computed in float64, and anew from the images that are left where the estimated error of
    the trace exceeds ``Engine.drift``, and at the end.
    """
    count = len(chosen)
    kept = concatenate([offer.embedding for offer in chosen]).to(torch.float64)
    scores = start_scores(kept, *objective.matrices())
    while len(chosen) > budget:
        pool.progress("prune", count - len(chosen), count - budget)
        worst = least_missed(scores)
        change = objective.remove(take(kept, slice(worst, worst + 1)))
        advance(scores, kept, change)
        rest = torch.arange(len(chosen)) != worst
        kept, scores = take(kept, rest).map(Tensor.contiguous), scores[..., rest].contiguous()
        chosen = chosen[:worst] + chosen[worst + 1 :]
        if len(chosen) == budget or objective.error(kept) > pool.engine.drift:
            before = objective.value
            try:
                objective = objective.rebuild(kept)
            except torch.linalg.LinAlgError:
                raise FloatingPointError(TOO_SMALL) from None
            if not objective.error(kept) <= MAX_EXACT_DRIFT:
                raise FloatingPointError(TOO_SMALL)
            error = abs(before - objective.value) / max(abs(objective.value), 1e-300)
            pool.note("largest error of the objective before it was computed anew", error)
            if len(chosen) > budget:
                pool.note("times the objective was computed anew", 1.0, float.__add__)
                scores = start_scores(kept, *objective.matrices())
    return objective, chosen


def approximation_error(pool: Pool, mask: Mask, options: TraceOptions) -> float:
    """Relative error, by keeping few classes, of ``tr((lambda I + F)^-1 F)`` with F the mean information of a sample.

    The shards must hold the embeddings with few classes.
    """
    (one,) = pool.embeddings_at(torch.zeros(1, dtype=torch.long))
    sample = pool.sample(sample_size(contrasts.count(one.num_classes, options.class_weighting)))
    images = torch.cat(pool.shards.call("images_at", sample))
    (exact,) = pool.shards.scatter("embed_images", [(images, mask, options.class_weighting)])
    return relative_error(exact, concatenate(pool.embeddings_at(sample)), options.damping)


def least_missed(scores: Tensor) -> int:
    """Which image in M raises the trace the least when taken out: ``tr((I - P)^-1 Q)``; the first of equal ones."""
    return int(gains(torch.stack([-scores[0], scores[1]])).argmin())


def objective_of(pool: Pool, budget: int, options: TraceOptions = TraceOptions()) -> Objective:  # noqa: B008  frozen
    """The objective before any pick; the shards must hold embeddings.

    Raises:
        FloatingPointError: the information is not finite, or M cannot be inverted.
    """
    pool.progress("information", 0, 1)
    found = pool.shards.call("largest_information")
    if not all(map(math.isfinite, found)):
        raise FloatingPointError("the pool's Fisher information is not finite: the model's outputs overflow")
    largest = max(found)
    # Every sum of parts stays below the number of parts times the largest; 2^62 quanta of it fit a whole number.
    parts = -(-pool.size // NARROW)
    quantum = 2.0 ** (math.ceil(math.log2(max(largest, 1e-200) * parts)) - 62)
    total = len(pool.labeled) + budget
    (one,) = pool.embeddings_at(torch.zeros(1, dtype=torch.long))
    everything, known = (part.double() for part in pool.shards.total("information", pool.labeled, quantum))
    target = everything.mul_(quantum / pool.size)
    sizes = one.num_classes, len(one.hidden)
    if options.target == "identity":
        add_identity(target.zero_(), 1.0, *sizes)
    start = known.mul_(quantum / total if options.initial_information else 0.0)
    add_identity(start, options.damping, *sizes)
    weight = budget if options.batch_weighting == "bait" else 1
    # With the target identity, the trace also has a part in the E directions that no embedding reaches.
    constant = len(one.hidden) / options.damping if options.target == "identity" else 0.0
    try:
        objective = Objective(start, target, math.sqrt(weight / total), constant, options.oversample > 1)
    except torch.linalg.LinAlgError:
        raise FloatingPointError(TOO_SMALL) from None
    return objective

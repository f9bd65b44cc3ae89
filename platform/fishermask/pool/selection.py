"""The greedy loop over shards: ask each for its best candidate, take the best of those, tell all what it changed."""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fishermask.pool.pool import Pool
from fishermask.pool.shard import NARROW, Offer, Scorer, moved
from fishermask.tensors import contrasts
from fishermask.tensors.approximation import relative_error, sample_size
from fishermask.tensors.contrasts import Weighting
from fishermask.tensors.embedding import Embedding, add_identity, concatenate, take
from fishermask.tensors.mask import Mask
from fishermask.tensors.trace import Objective, TraceScorer, Update, advance, gains, start_scores

TOO_SMALL = "strategy.params.damping: too small for the information matrix to be inverted; raise it"
RESCORE_AFTER = 16
"""Picks between two times that all scores are computed anew because they drifted."""
RESCORE_EVERY = 256
"""Picks after which they are in any case: what has to be repeated when a shard or a selection is lost is bounded."""


class Criterion(Protocol):
    """What a greedy strategy knows of all picks so far; the shards' part of it is its ``Scorer``."""

    def scorer(self) -> Scorer:
        """What shards compute scores from that know of all picks so far."""

    def drift(self, offer: Offer) -> float | None:
        """Relative error of the gain that a shard found for ``offer``; None if none can arise.

        Where none can, ``scorer`` is asked for before the first pick only.
        """

    def add(self, offer: Offer) -> Any:
        """Take ``offer``; what that changes in all shards' scores."""


def greedy(pool: Pool, criterion: Criterion, budget: int) -> list[Offer]:
    """``budget`` picks, each the candidate with the largest gain; ties go to the lowest position.

    The shards must hold embeddings. Scores are computed anew when they have drifted by more than ``Engine.drift`` of a
    gain, and every ``RESCORE_EVERY`` picks. Picks that the pool's journal holds are taken as they are.
    """
    chosen, fresh, offers = _replay(pool, criterion)
    while len(chosen) < budget:
        best = best_offer(offers)
        drift, age = criterion.drift(best), len(chosen) - fresh
        if drift is not None and (age >= RESCORE_EVERY or (age >= RESCORE_AFTER and drift > pool.engine.drift)):
            pool.note("largest drift of a gain before scores were computed anew", drift, max)
            pool.note("times scores were computed anew", 1.0, float.__add__)
            offers = _start(pool, criterion, chosen)
            best, fresh = best_offer(offers), len(chosen)
            drift = criterion.drift(best)
        if drift is not None:
            pool.note("largest drift of a gain", drift, max)
        change = criterion.add(best)
        chosen.append(best)
        pool.engine.journal(best.position, fresh == len(chosen) - 1)
        pool.progress("pick", len(chosen), budget)
        if len(chosen) < budget:
            offers = pool.shards.call("advance", change, best.position)
    return chosen


def _start(pool: Pool, criterion: Criterion, chosen: list[Offer]) -> list[Offer | None]:
    taken = torch.tensor([offer.position for offer in chosen], dtype=torch.long)
    left = pool.candidates[~torch.isin(pool.candidates, taken)]
    return pool.shards.call("start_selection", criterion.scorer(), left, len(chosen))


def _replay(pool: Pool, criterion: Criterion) -> tuple[list[Offer], int, list[Offer | None]]:
    """What the journal's picks come to: the picks, how many there were when scores were last computed, new offers."""
    positions = [position for position, _ in pool.engine.past]
    embeddings = pool.embeddings_at(torch.tensor(positions, dtype=torch.long))
    past = [Offer(math.nan, *pick) for pick in zip(positions, embeddings, strict=True)]
    fresh = max((i for i, (_, rescored) in enumerate(pool.engine.past) if rescored), default=0)
    for i, offer in enumerate(past[:fresh]):
        if pool.engine.past[i][1]:
            criterion.scorer()  # it may gather what came before, which rounds: do all that was done then
        criterion.add(offer)
    offers = _start(pool, criterion, past[:fresh])
    for i, offer in enumerate(past[fresh:], start=fresh):
        change = criterion.add(offer)
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
    """... plus the labelled images' share of the information."""
    class_weighting: Weighting = "sqrt"
    """With sqrt, V^T V is the Fisher information; with none, classes count alike, however probable."""
    top_classes: int | None = None
    """q: an approximation that keeps the q most probable classes of each image, renormalised."""
    batch_weighting: Literal["bait", "per_sample"] = "bait"
    """A candidate counts K / (nL + K), as BAIT's code has it, or 1 / (nL + K), as a labelled image does."""
    target: Literal["pool", "identity"] = "pool"
    """F: the mean information of the whole pool, or the identity (A-optimal design)."""
    oversample: float = 1.0
    """r: choose r times the budget, then take back, one by one, what is missed least."""


@dataclass(frozen=True)
class DistanceCriterion:
    """Scores by distance to the nearest pick: a pick changes them as it is, and nothing adds up."""

    first: Scorer

    def scorer(self) -> Scorer:
        return self.first

    def drift(self, offer: Offer) -> None:
        return None

    def add(self, offer: Offer) -> Embedding:
        return offer.embedding


@dataclass
class TraceCriterion:
    """Minimise ``tr(M^-1 F)``."""

    objective: Objective
    dtype: torch.dtype
    """Of the shards' scores: what they are told comes in it."""
    _asked: tuple[int, Update] | None = None

    def scorer(self) -> TraceScorer:
        return TraceScorer(*self.objective.matrices(self.dtype))

    def drift(self, offer: Offer) -> float:
        # What is needed to know the exact gain is all that is needed to take the offer.
        update = self.objective.consider(offer.embedding)
        self._asked = offer.position, update
        return abs(offer.gain - update.gain) / max(abs(update.gain), 1e-300)

    def add(self, offer: Offer) -> Update:
        known = self._asked is not None and self._asked[0] == offer.position
        update = self._asked[1] if known and self._asked else self.objective.consider(offer.embedding)
        self.objective.apply(update)
        self._asked = None
        return moved(update, self.dtype)


def minimise_trace(pool: Pool, mask: Mask, budget: int, options: TraceOptions) -> Tensor:
    """``budget`` candidates, in the order of choice, that greedily minimise ``tr(M^-1 F)`` (Ash et al. 2021).

    Raises:
        FloatingPointError: the information is not finite, or rounding decides what is left of the trace.
    """
    pool.embed(mask, options.class_weighting, options.top_classes)
    objective = objective_of(pool, budget, options)
    count = min(len(pool.candidates), math.ceil(options.oversample * budget))
    chosen = greedy(pool, TraceCriterion(objective, pool.scores_type), count)
    if options.top_classes is not None:
        pool.note(
            "relative error of the objective by top_classes, on a sample", approximation_error(pool, mask, options)
        )
    pool.shards.call("clear")
    for left in range(count - budget, 0, -1):
        pool.progress("prune", count - budget - left, count - budget)
        if left == count - budget:
            # In float64, for there are few: what is missed least is told by small differences of large numbers.
            kept = concatenate([offer.embedding for offer in chosen]).to(torch.float64)
            scores = start_scores(kept, *objective.matrices())
        worst = least_missed(scores)
        change = objective.remove(take(kept, slice(worst, worst + 1)))
        advance(scores, kept, change)
        rest = torch.arange(len(chosen)) != worst
        kept, scores = take(kept, rest).map(Tensor.contiguous), scores[..., rest].contiguous()
        del chosen[worst]
    if objective.value < 0:
        raise FloatingPointError(TOO_SMALL)
    pool.note("objective", objective.value)
    return torch.tensor([offer.position for offer in chosen])


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
    try:
        objective = Objective(start, target, math.sqrt(weight / total))
    except torch.linalg.LinAlgError:
        raise FloatingPointError(TOO_SMALL) from None
    if options.target == "identity":
        objective.value += len(one.hidden) / options.damping  # of the directions that no embedding has a part in
    return objective

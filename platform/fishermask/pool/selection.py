"""The greedy loop over shards: ask each for its best candidate, take the best of those, tell all what it changed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fishermask.pool.pool import Pool
from fishermask.pool.shard import Offer, Scorer
from fishermask.tensors.embedding import Embedding, concatenate, take
from fishermask.tensors.mask import Mask
from fishermask.tensors.trace import Objective, TraceScorer, advance, gains, start_scores


def greedy(pool: Pool, scorer: Scorer, budget: int, update: Callable[[Offer, int], Any]) -> list[Offer]:
    """``budget`` picks, each the candidate with the largest gain; ties go to the lowest position.

    The shards must hold embeddings. ``update`` says what a pick, the how-manieth, changes in all shards' states.
    """
    offers = pool.shards.call("start_selection", scorer, pool.candidates)
    chosen: list[Offer] = []
    while True:
        best = best_offer(offers)
        change = update(best, len(chosen))
        chosen.append(best)
        pool.progress("pick", len(chosen), budget)
        if len(chosen) == budget:
            return chosen
        offers = pool.shards.call("advance", change, best.position)


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
    class_weighting: Literal["sqrt", "none"] = "sqrt"
    """w_c of the embeddings; with sqrt, V^T V is the Fisher information."""
    batch_weighting: Literal["bait", "per_sample"] = "bait"
    """A candidate counts K / (nL + K), as BAIT's code has it, or 1 / (nL + K), as a labelled image does."""
    target: Literal["pool", "identity"] = "pool"
    """F: the mean information of the whole pool, or the identity (A-optimal design)."""
    oversample: float = 1.0
    """r: choose r times the budget, then take back, one by one, what is missed least."""


def minimise_trace(pool: Pool, mask: Mask, budget: int, options: TraceOptions) -> Tensor:
    """``budget`` candidates, in the order of choice, that greedily minimise ``tr(M^-1 F)`` (Ash et al. 2021).

    Raises:
        FloatingPointError: the information is not finite.
    """
    pool.in_pieces("embed", "embed", mask, options.class_weighting)
    objective = _objective(pool, budget, options)
    scorer = TraceScorer(*objective.matrices())
    count = min(len(pool.candidates), math.ceil(options.oversample * budget))
    chosen = greedy(pool, scorer, count, lambda offer, _: objective.add(offer.embedding))
    pool.shards.call("clear")
    for left in range(count - budget, 0, -1):
        pool.progress("prune", count - budget - left, count - budget)
        if left == count - budget:
            kept = concatenate([offer.embedding for offer in chosen])
            scores = start_scores(kept, *(matrix.to(kept.hidden) for matrix in objective.matrices()))
        worst = least_missed(scores)
        change = objective.remove(take(kept, slice(worst, worst + 1)))
        advance(scores, kept, type(change)(*(part.to(kept.hidden) for part in change)))
        rest = torch.arange(len(chosen)) != worst
        kept, scores = Embedding(*(part.contiguous() for part in take(kept, rest))), scores[..., rest].contiguous()
        del chosen[worst]
    return torch.tensor([offer.position for offer in chosen])


def least_missed(scores: Tensor) -> int:
    """Which image in M raises the trace the least when taken out: ``tr((I - P)^-1 Q)``; the first of equal ones."""
    return int(gains(torch.stack([-scores[0], scores[1]])).argmin())


def _objective(pool: Pool, budget: int, options: TraceOptions) -> Objective:
    pool.progress("information", 0, 1)
    sums = [pair for pair in pool.shards.call("information", pool.labeled) if len(pair[0])]
    everything, known = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
    if not torch.isfinite(everything).all():
        raise FloatingPointError("the pool's Fisher information is not finite: the model's outputs overflow")
    eye = torch.eye(len(everything), dtype=torch.float64)
    total = len(pool.labeled) + budget
    start = options.damping * eye + (known / total if options.initial_information else 0)
    target = everything / pool.size if options.target == "pool" else eye
    weight = budget if options.batch_weighting == "bait" else 1
    return Objective(start, target, math.sqrt(weight / total))

"""The greedy loop over shards: ask each for its best candidate, take the best of those, tell all what it changed."""

import math

import torch
from torch import Tensor

from fishermask.pool.pool import Pool
from fishermask.pool.shard import Offer
from fishermask.tensors.mask import Mask
from fishermask.tensors.trace import Objective


def minimise_trace(pool: Pool, mask: Mask, budget: int, *, damping: float) -> Tensor:
    """``budget`` candidates, in the order of choice, that greedily minimise ``tr(M^-1 F)`` (BAIT, Ash et al. 2021).

    F is the mean Fisher information of the whole pool on the masked parameters, M starts as ``damping`` times the
    identity plus the labelled images' share, and each pick adds its own. Ties go to the lowest position.
    """
    pool.in_pieces("embed", "embed", mask)
    pool.progress("information", 0, 1)
    sums = [pair for pair in pool.shards.call("information", pool.labeled) if len(pair[0])]
    everything, known = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
    if not torch.isfinite(everything).all():
        raise FloatingPointError("the pool's Fisher information is not finite: the model's outputs overflow")
    num_labeled = len(pool.labeled)
    start = damping * torch.eye(len(everything), dtype=torch.float64) + known / (num_labeled + budget)
    objective = Objective(start, everything / pool.size, math.sqrt(budget / (num_labeled + budget)))
    offers = pool.shards.call("start_selection", *objective.matrices(), pool.candidates)
    chosen: list[int] = []
    while True:
        best = best_offer(offers)
        update = objective.add(best.embedding)
        chosen.append(best.position)
        pool.progress("pick", len(chosen), budget)
        if len(chosen) == budget:
            pool.shards.call("clear")
            return torch.tensor(chosen)
        offers = pool.shards.call("advance", update, best.position)


def best_offer(offers: list[Offer | None]) -> Offer:
    """The offer with the largest gain; of equal ones the lowest position."""
    return max((offer for offer in offers if offer is not None), key=lambda offer: (offer.gain, -offer.position))

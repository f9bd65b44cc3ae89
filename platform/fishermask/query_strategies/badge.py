"""Choose uncertain and diverse images: k-means++ on last-layer gradients of the loss (BADGE, Ash et al. 2020)."""

import torch
from torch import Tensor, nn

from fishermask.config import Config
from fishermask.planning.workload import Workload
from fishermask.pool.pool import Pool
from fishermask.pool.selection import DistanceCriterion, greedy, record_picks
from fishermask.tensors.distances import BadgeScorer
from fishermask.tensors.gradient_plan import plan_gradients
from fishermask.tensors.mask import last_layer_mask


def check(params: Config, model: nn.Module, images: Tensor) -> Workload:
    """Require a model that ends in a linear layer; return the workload of a query."""
    return Workload(last_layer_mask(plan_gradients(model, images)).plan, trace=False)


def query(pool: Pool, budget: int, params: Config) -> Tensor:
    """Return the positions of ``budget`` candidates, drawn in proportion to the squared distance to earlier picks."""
    pool.store_embeddings(last_layer_mask(pool.plan_gradients()))
    seed = int(torch.randint(2**31, (1,), generator=pool.generator))
    picks = greedy(pool, DistanceCriterion(BadgeScorer(seed), pool.scores_type), budget)
    pool.free_embeddings()
    return record_picks(pool, picks)

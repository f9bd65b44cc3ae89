"""Choose images far from all labeled images: greedy k-center on inputs of the last layer (Sener, Savarese 2018)."""

import torch
from torch import Tensor, nn

from fishermask.config import Config
from fishermask.errors import InputError
from fishermask.planning.workload import Workload
from fishermask.pool.pool import Pool
from fishermask.pool.selection import DistanceCriterion, greedy, record_picks
from fishermask.tensors.distances import KCenterScorer
from fishermask.tensors.gradient_plan import plan_gradients
from fishermask.tensors.mask import last_layer_mask


def check(params: Config, model: nn.Module, images: Tensor) -> Workload:
    """Require a model that ends in a linear layer; return the workload of a query."""
    return Workload(last_layer_mask(plan_gradients(model, images)).plan, trace=False)


def query(pool: Pool, budget: int, params: Config) -> Tensor:
    """Return the positions of ``budget`` candidates, each the farthest from all labeled images and earlier picks."""
    if not len(pool.labeled):
        raise InputError(
            "labeled: coreset measures distances to labeled images, but none is labeled; label one or more"
        )
    pool.store_embeddings(last_layer_mask(pool.plan_gradients()))
    labeled = [embedding.hidden for embedding in pool.embeddings_at(pool.labeled)]
    criterion = DistanceCriterion(KCenterScorer(torch.cat(labeled, dim=1)), pool.scores_type)
    picks = greedy(pool, criterion, budget)
    pool.free_embeddings()
    return record_picks(pool, picks)

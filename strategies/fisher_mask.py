"""Batch that best covers the pool's Fisher information on the few parameters that matter (arXiv 2411.05752)."""

from pydantic import Field
from torch import Tensor, nn

from fishermask.config import Config
from fishermask.pool.pool import Pool
from fishermask.pool.selection import minimise_trace
from fishermask.tensors.backprop import find_head
from fishermask.tensors.layer_rules import check_rules
from fishermask.tensors.mask import global_mask, head_size, mask_size


class Params(Config):
    fraction: float = Field(0.01, gt=0, le=1)
    """Masked share of all parameters: the whole last layer, and the rest by largest Fisher information."""
    fisher_samples: int = Field(1024, ge=1)
    """Pool images, drawn at random, that the Fisher information of each parameter is averaged over."""
    damping: float = Field(1.0, gt=0)
    """lambda: how much identity is added to the labelled images' information."""


def check(params: Params, model: nn.Module, image: Tensor) -> None:
    """All layers must have gradient rules, and the mask must hold the last one."""
    check_rules(model)
    mask_size(model, find_head(model, image), params.fraction)


def query(pool: Pool, budget: int, params: Params) -> Tensor:
    """Positions of ``budget`` candidates that greedily minimise the trace of the inverse information."""
    head = pool.head()
    body_size = mask_size(pool.model, head, params.fraction) - head_size(pool.model, head)
    mask = global_mask(pool.fisher_diagonal(head, params.fisher_samples), head, body_size)
    return minimise_trace(pool, mask, budget, damping=params.damping)

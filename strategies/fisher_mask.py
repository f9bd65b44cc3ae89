"""Batch that best covers the pool's Fisher information on the few parameters that matter (arXiv 2411.05752)."""

from pydantic import Field
from torch import Tensor, nn

from fishermask.config import Config
from fishermask.pool.pool import Pool
from fishermask.pool.selection import minimise_trace
from fishermask.tensors.layout import inspect
from fishermask.tensors.mask import global_mask, head_size, mask_size


class Params(Config):
    fraction: float = Field(0.01, gt=0, le=1)
    """Masked share of all parameters: the whole last layer, and the rest by largest Fisher information."""
    fisher_samples: int = Field(1024, ge=1)
    """Pool images, drawn at random, that the Fisher information of each parameter is averaged over."""
    damping: float = Field(1.0, gt=0)
    """lambda: how much identity is added to the labelled images' information."""


def check(params: Params, model: nn.Module, image: Tensor) -> None:
    """The mask must hold the last layer."""
    mask_size(model, inspect(model, image), params.fraction)


def query(pool: Pool, budget: int, params: Params) -> Tensor:
    """Positions of ``budget`` candidates that greedily minimise the trace of the inverse information."""
    layout = pool.layout()
    body_size = mask_size(pool.model, layout, params.fraction) - head_size(pool.model, layout)
    mask = global_mask(pool.fisher_diagonal(layout, params.fisher_samples), layout, body_size)
    return minimise_trace(pool, mask, budget, damping=params.damping)

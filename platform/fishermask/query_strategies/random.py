"""Choose images uniformly at random: the baseline of all comparisons."""

import torch
from torch import Tensor, nn

from fishermask.config import Config
from fishermask.pool.pool import Pool


def check(params: Config, model: nn.Module, images: Tensor) -> None:
    """Accept every model, because the strategy uses no predictions; return None for a query that reads no sample."""


def query(pool: Pool, budget: int, params: Config) -> Tensor:
    """Return the positions of ``budget`` random candidates."""
    order = torch.randperm(len(pool.candidates), generator=pool.generator)
    return pool.candidates[order[:budget]]

"""Uniformly at random, without replacement: what every other strategy is measured against."""

import torch
from torch import Tensor, nn

from fishermask.config import Config
from fishermask.pool.pool import Pool


def check(params: Config, model: nn.Module, images: Tensor) -> None:
    """Goes with every model: no image is looked at."""


def query(pool: Pool, budget: int, params: Config) -> Tensor:
    """Positions of ``budget`` random candidates."""
    order = torch.randperm(len(pool.candidates), generator=pool.generator)
    return pool.candidates[order[:budget]]

"""Uniformly at random, without replacement: what every other strategy is measured against."""

import torch
from torch import Tensor

from fishermask.config import Config
from fishermask.pool.pool import Pool


def query(pool: Pool, budget: int, params: Config) -> Tensor:
    """Positions of ``budget`` random candidates."""
    order = torch.randperm(len(pool.candidates), generator=pool.generator)
    return pool.candidates[order[:budget]]

"""Choose images with the largest entropy of the predicted probabilities (Shannon 1948; Settles 2009, section 3.1)."""

import torch
from torch import Tensor

from fishermask.config import Config
from fishermask.pool.pool import Pool


def query(pool: Pool, budget: int, params: Config) -> Tensor:
    """Return the positions of the ``budget`` candidates with the largest entropy; ties go to the lowest position."""
    entropy = torch.special.entr(pool.probabilities()).sum(-1)
    return pool.candidates[entropy.sort(descending=True, stable=True).indices[:budget]]

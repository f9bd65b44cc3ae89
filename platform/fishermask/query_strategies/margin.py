"""Choose images with the smallest gap between the two largest probabilities (Scheffer, Decomain, Wrobel 2001)."""

from torch import Tensor

from fishermask.config import Config
from fishermask.pool.pool import Pool
from fishermask.tensors.confidence import other_probability, sort_by_confidence


def query(pool: Pool, budget: int, params: Config) -> Tensor:
    """Return the positions of the ``budget`` candidates with the smallest margin, ties by position."""
    probabilities = pool.probabilities()
    top = probabilities.topk(2).values
    doubt = other_probability(probabilities) + top[:, 1]
    return pool.candidates[sort_by_confidence(top[:, 0] - top[:, 1], doubt)[:budget]]

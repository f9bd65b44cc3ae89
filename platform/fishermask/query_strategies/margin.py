"""Choose images with the smallest gap between the two largest probabilities (Scheffer, Decomain, Wrobel 2001)."""

from torch import Tensor

from fishermask.config import Config
from fishermask.pool.pool import Pool


def query(pool: Pool, budget: int, params: Config) -> Tensor:
    """Return the positions of the ``budget`` candidates with the smallest margin; ties go to the lowest position."""
    top = pool.probabilities().topk(2).values
    order = (top[:, 0] - top[:, 1]).sort(stable=True).indices
    return pool.candidates[order[:budget]]

"""Choose images whose most probable class has the smallest probability (Lewis, Gale 1994)."""

from torch import Tensor

from fishermask.config import Config
from fishermask.pool.pool import Pool


def query(pool: Pool, budget: int, params: Config) -> Tensor:
    """Return the positions of the ``budget`` candidates with the least confident predictions, ties by position."""
    confidence = pool.probabilities().amax(-1)
    return pool.candidates[confidence.sort(stable=True).indices[:budget]]

"""Smallest probability of the most probable class (Lewis, Gale 1994)."""

from torch import Tensor

from fishermask.config import Config
from fishermask.pool.pool import Pool


def query(pool: Pool, budget: int, params: Config) -> Tensor:
    """Return the positions of the ``budget`` candidates with the least confident predictions; ties to the lowest."""
    confidence = pool.probabilities().amax(-1)
    return pool.candidates[confidence.sort(stable=True).indices[:budget]]

"""Smallest probability of the most probable class (Lewis, Gale 1994)."""

from torch import Tensor

from fishermask.config import Config
from fishermask.pool.pool import Pool


def query(pool: Pool, budget: int, params: Config) -> Tensor:
    """Positions of the ``budget`` candidates with the least confident prediction; ties to the lowest position."""
    confidence = pool.probabilities().amax(-1)
    return pool.candidates[confidence.sort(stable=True).indices[:budget]]

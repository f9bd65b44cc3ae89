"""Choose images whose most probable class has the smallest probability (Lewis, Gale 1994)."""

from torch import Tensor

from fishermask.config import Config
from fishermask.pool.pool import Pool
from fishermask.tensors.confidence import other_probability, sort_by_confidence


def query(pool: Pool, budget: int, params: Config) -> Tensor:
    """Return the positions of the ``budget`` candidates with the least confident predictions, ties by position."""
    probabilities = pool.probabilities()
    confidence = probabilities.amax(-1)
    return pool.candidates[sort_by_confidence(confidence, other_probability(probabilities))[:budget]]

"""The order of samples by the confidence of their predictions, also where the largest probability rounds to 1."""

import torch
from torch import Tensor


def other_probability(probabilities: Tensor) -> Tensor:
    """Return the sum of all but the largest probability where the largest rounds to 1, else 0: [n].

    Overwrites ``probabilities`` [n, C], which may be large.
    """
    largest, index = probabilities.max(-1)
    others = probabilities.scatter_(-1, index[:, None], 0.0).sum(-1)
    return torch.where(largest == 1, others, 0.0)


def sort_by_confidence(confidence: Tensor, doubt: Tensor) -> Tensor:
    """Return the order of ascending ``confidence`` [n]; equal ones by descending ``doubt`` [n], then by position."""
    order = doubt.sort(descending=True, stable=True).indices
    return order[confidence[order].sort(stable=True).indices]

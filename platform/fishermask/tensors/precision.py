"""Data types of the engine's computations."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """Data types of a query; None stands for the model's own type."""

    storage: torch.dtype | None = None
    """Type of the stored embeddings, which take most of the memory of a shard."""
    scores: torch.dtype | None = None
    """Type of the scores and of all products that update them."""
    autocast: torch.dtype | None = None
    """Type in which layers compute while gradients are computed."""
    channels_last: bool = False
    """Whether images and convolutions use the memory format ``channels_last`` while gradients are computed."""

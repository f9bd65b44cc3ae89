"""Which types the engine computes and keeps its numbers in."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """None is the model's own type."""

    storage: torch.dtype | None = None
    """Of the embeddings, the bulk of what a shard holds."""
    scores: torch.dtype | None = None
    """Of the scores, and of all products that change them."""
    autocast: torch.dtype | None = None
    """Of the layers while gradients are computed."""
    channels_last: bool = False
    """Memory layout of images and convolutions while gradients are computed."""

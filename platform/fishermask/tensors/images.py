"""Images stay uint8 [n, channels, height, width] in memory; batches are normalised, and augmented, on the fly."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CROP_PADDING = 4


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel, on the scale 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def channel_statistics(images: Tensor) -> Statistics:
    """Statistics of ``images``, uint8 [n, channels, height, width]."""
    # Exact integer sums, chunk by chunk: no float copy of the whole pool, and no dependence on the chunk's size.
    count = images.numel() // images.shape[1]
    total = sum(chunk.sum((0, 2, 3), dtype=torch.int64) for chunk in images.split(1024))
    squares = sum(chunk.int().square().sum((0, 2, 3), dtype=torch.int64) for chunk in images.split(1024))
    assert isinstance(total, Tensor) and isinstance(squares, Tensor)
    mean = total.double() / count
    # A constant channel has no scale of its own; one grey level keeps the division defined.
    std = (squares.double() / count - mean.square()).clamp_min(1.0).sqrt()
    return Statistics(tuple((mean / 255).tolist()), tuple((std / 255).tolist()))


def normalise(images: Tensor, statistics: Statistics, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images as ``(x / 255 - mean) / std``."""
    shape = (1, -1, 1, 1)
    mean = torch.tensor(statistics.mean, dtype=dtype, device=images.device).view(shape)
    std = torch.tensor(statistics.std, dtype=dtype, device=images.device).view(shape)
    # One grey channel may carry any stride, and a convolution takes another path, with another rounding, for some:
    # the same pixels must give the same floats wherever they come from.
    images = images.reshape(-1).view(images.shape)
    return (images.to(dtype) / 255 - mean) / std


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to 4 pixels (zeros come in) and flipped left to right with probability 1/2."""
    n, _, height, width = images.shape
    span = 2 * CROP_PADDING + 1
    top = torch.randint(span, (n,), generator=generator).to(images.device)
    left = torch.randint(span, (n,), generator=generator).to(images.device)
    flip = (torch.rand(n, generator=generator) < 0.5).to(images.device)
    columns = torch.arange(width, device=images.device).expand(n, width)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + left[:, None]
    rows = torch.arange(height, device=images.device) + top[:, None]
    padded = F.pad(images, (CROP_PADDING,) * 4)
    sample = torch.arange(n, device=images.device)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

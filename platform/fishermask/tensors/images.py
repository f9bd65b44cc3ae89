"""Samples of a pool, and how a batch of them becomes a model's input.

Images stay uint8 [n, channels, height, width] and are normalized, and augmented, one batch at a time.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

CROP_PADDING = 4
READ_BATCH = 256


class Images(Protocol):
    """Samples [n, ...]: a tensor, or an object that returns a tensor when it is indexed.

    Images of a data set are uint8 [n, channels, height, width]. Other samples, such as features, may have any shape.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of samples, then the shape of one sample."""

    def __len__(self) -> int: ...

    def __getitem__(self, selection: slice | Tensor, /) -> Tensor:
        """Return the samples of a slice, or at an index tensor [m] of any order."""

    def narrow(self, dim: int, start: int, length: int) -> "Images":
        """Return ``length`` samples from ``start``, without a copy; ``dim`` is 0."""


class Preprocess(Protocol):
    """Function from samples of the pool to inputs of the model. Ray must be able to pickle it."""

    def __call__(self, samples: Tensor, dtype: torch.dtype, /) -> Tensor:
        """Return the inputs [n, ...] for ``samples`` [n, ...], of type ``dtype`` and on the same device.

        Equal samples must give equal inputs, whatever the other samples are.
        """


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel, on the scale 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return uint8 ``images`` normalized; see ``normalize``."""
        return normalize(images, self, dtype)


def channel_statistics(images: Images) -> Statistics:
    """Return the channel statistics of uint8 ``images``; read them once, one batch at a time."""
    count, channels, height, width = images.shape
    # Integer counts of each gray level in each channel are exact for any batch size.
    levels, counts = torch.arange(256), torch.zeros(channels, 256, dtype=torch.int64)
    for start in range(0, count, READ_BATCH):
        batch = images[start : start + READ_BATCH].transpose(0, 1).flatten(1)
        counts += torch.stack([channel.bincount(minlength=256) for channel in batch])
    total, squares = (counts * levels).sum(1), (counts * levels.square()).sum(1)
    count *= height * width
    mean = total.double() / count
    # The deviation is at least one gray level, because a constant channel would divide by zero.
    std = (squares.double() / count - mean.square()).clamp_min(1.0).sqrt()
    return Statistics(tuple((mean / 255).tolist()), tuple((std / 255).tolist()))


def normalize(images: Tensor, statistics: Statistics, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``(x / 255 - mean) / std`` of uint8 images; allocate no other tensor of the size of the result."""
    shape = (1, -1, 1, 1)
    mean = torch.tensor(statistics.mean, dtype=dtype, device=images.device).view(shape)
    std = torch.tensor(statistics.std, dtype=dtype, device=images.device).view(shape)
    # The result must depend on the pixels only, but a dimension of size one may have any stride, and convolutions round
    # differently for some strides.
    images = images.reshape(-1).view(images.shape)
    return images.to(dtype, copy=True).div_(255).sub_(mean).div_(std)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image, shifted by up to 4 pixels with zeros at the borders, and mirrored with probability 1/2."""
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

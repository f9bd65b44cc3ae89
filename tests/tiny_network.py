"""A small network that trains and evaluates differently, for tests that name it in their settings."""

from torch import nn


def build(num_classes: int, channels: int = 3, dropout: float = 0.0) -> nn.Module:
    """Return a network for images of 8 x 8 pixels: a convolution, batch norm, dropout and a linear head."""
    convolution = nn.Conv2d(channels, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*convolution, nn.Flatten(), nn.Dropout(dropout), nn.Linear(36, num_classes))

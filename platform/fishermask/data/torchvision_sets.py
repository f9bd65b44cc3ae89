"""CIFAR10, CIFAR100, MNIST, FashionMNIST and SVHN as torchvision stores them."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.datasets

from fishermask.config import DataConfig
from fishermask.data.split import Split, row_ids
from fishermask.errors import InputError
from fishermask.tensors.images import Statistics


class TorchvisionSet(NamedTuple):
    train: dict[str, Any]
    """The keyword that picks the training split, and the same for the test split."""
    test: dict[str, Any]
    statistics: Statistics


_BY_FLAG: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
SETS: dict[str, TorchvisionSet] = {
    "CIFAR10": TorchvisionSet(*_BY_FLAG, Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))),
    "CIFAR100": TorchvisionSet(*_BY_FLAG, Statistics((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))),
    "MNIST": TorchvisionSet(*_BY_FLAG, Statistics((0.1307,), (0.3081,))),
    "FashionMNIST": TorchvisionSet(*_BY_FLAG, Statistics((0.2860,), (0.3530,))),
    "SVHN": TorchvisionSet(
        {"split": "train"}, {"split": "test"}, Statistics((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
    ),
}


def load(config: DataConfig) -> tuple[Split, Split, list[str], Statistics]:
    """Training split, test split, class names and published statistics.

    Raises:
        InputError: no root given, or the data set is not there and ``download`` is off.
    """
    if config.root is None:
        raise InputError(f"data.root: missing; give the folder that holds (or shall hold) {config.name}")
    kind = SETS[config.name]
    train, classes = _split(config, "train", kind.train)
    test, _ = _split(config, "test", kind.test)
    return train, test, classes, kind.statistics


def _split(config: DataConfig, split: str, which: dict[str, Any]) -> tuple[Split, list[str]]:
    assert config.root is not None
    root = Path(config.root).expanduser()
    try:
        source = getattr(torchvision.datasets, config.name)(root, download=config.download, **which)
    except (RuntimeError, OSError) as error:
        remedy = "check the network" if config.download else "set data.download to true, or data.root to its folder"
        raise InputError(f"data.root: {config.name} cannot be read from {root} ({error}); {remedy}") from None
    # SVHN keeps [n, channels, height, width], CIFAR [n, height, width, channels], MNIST [n, height, width].
    pixels = torch.as_tensor(np.asarray(source.data))
    if pixels.dim() == 3:
        pixels = pixels[:, None]
    elif config.name != "SVHN":
        pixels = pixels.permute(0, 3, 1, 2)
    labels = torch.as_tensor(np.asarray(source.labels if config.name == "SVHN" else source.targets)).long()
    classes = [str(name) for name in getattr(source, "classes", range(int(labels.max()) + 1))]
    return Split(pixels.contiguous(), labels, row_ids(split, len(labels))), classes

"""CIFAR10, CIFAR100, MNIST, FashionMNIST and SVHN as torchvision stores them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torchvision.datasets

from fishermask.config import DataConfig
from fishermask.errors import InputError
from fishermask.guard import guarded
from fishermask.tensors.images import Statistics

BATCH = 4096


class TorchvisionSet(NamedTuple):
    train: dict[str, Any]
    """The keyword that picks the training split, and the same for the test split."""
    test: dict[str, Any]
    files: str
    """A glob, under torchvision's root, of what it keeps there."""
    statistics: Statistics


_BY_FLAG: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
SETS: dict[str, TorchvisionSet] = {
    "CIFAR10": TorchvisionSet(
        *_BY_FLAG, "cifar-10-batches-py/*", Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    ),
    "CIFAR100": TorchvisionSet(
        *_BY_FLAG, "cifar-100-python/*", Statistics((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    ),
    "MNIST": TorchvisionSet(*_BY_FLAG, "MNIST/raw/*", Statistics((0.1307,), (0.3081,))),
    "FashionMNIST": TorchvisionSet(*_BY_FLAG, "FashionMNIST/raw/*", Statistics((0.2860,), (0.3530,))),
    "SVHN": TorchvisionSet(
        {"split": "train"},
        {"split": "test"},
        "*_32x32.mat",
        Statistics((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    ),
}


def files(config: DataConfig) -> list[Path]:
    """The set's files, of both splits, as far as they are there.

    Raises:
        InputError: no root given.
    """
    return sorted(path for path in _root(config).glob(SETS[config.name].files) if not path.is_dir())


class TorchvisionSource:
    """A split of a torchvision set. These sets are small: torchvision loads all of it.

    Raises:
        InputError: no root given, or the data set is not there and ``download`` is off.
    """

    def __init__(self, config: DataConfig, split: str) -> None:
        root = _root(config)
        which = SETS[config.name].train if split == "train" else SETS[config.name].test
        remedy = "check the network" if config.download else "set data.download to true, or data.root to a whole copy"
        with guarded("data.root", f"{config.name} cannot be read from {root}; {remedy}"):
            source = getattr(torchvision.datasets, config.name)(root, download=config.download, **which)
            self._unpack(config, source)
        if not self.count or self.images.shape[0] != len(self.labels) or self.images.dtype != np.uint8:
            raise InputError(
                f"data.root: {config.name} in {root} holds {self.images.shape[0]} images of {self.images.dtype} and "
                f"{len(self.labels)} labels for {split}; the files must be whole and belong together"
            )
        if not all(isinstance(label, int) and 0 <= label < len(self.classes) for label in self.labels):
            raise InputError(
                f"data.root: {config.name} in {root} has labels that are none of its {len(self.classes)} classes"
            )

    def _unpack(self, config: DataConfig, source: Any) -> None:
        # SVHN keeps [n, channels, height, width], CIFAR [n, height, width, channels], MNIST [n, height, width].
        images = np.asarray(source.data)
        if images.ndim == 3:
            images = images[:, None]
        elif config.name != "SVHN":
            images = images.transpose(0, 3, 1, 2)
        labels = np.asarray(source.labels if config.name == "SVHN" else source.targets)
        self.images, self.labels, self.count = images, labels.tolist(), len(images)
        self.classes = [str(name) for name in getattr(source, "classes", range(max(self.labels) + 1))]

    def entries(self) -> Iterator[tuple[list[int], list[str | None]]]:
        """Labels of all rows; there are no paths."""
        yield self.labels, [None] * self.count

    def pixels(self, rows: np.ndarray, shape: tuple[int, ...] | None) -> Iterator[tuple[slice, np.ndarray]]:
        """The images of ``rows``, which have the set's one ``shape``."""
        for start in range(0, len(rows), BATCH):
            part = slice(start, start + BATCH)
            yield part, self.images[rows[part]]


def _root(config: DataConfig) -> Path:
    if config.root is None:
        raise InputError(f"data.root: missing; give the folder that holds (or shall hold) {config.name}")
    return Path(config.root).expanduser()

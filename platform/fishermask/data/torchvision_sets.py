"""CIFAR10, CIFAR100, MNIST, FashionMNIST and SVHN in the files of torchvision."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fishermask.config import DataConfig
from fishermask.data.decoding import is_gray, picture_to_pixels
from fishermask.errors import InputError
from fishermask.guard import guarded
from fishermask.tensors.images import Statistics

BATCH = 4096
"""Images returned per batch."""


class TorchvisionSet(NamedTuple):
    """Facts about a data set of torchvision that torchvision does not provide."""

    summary: str
    train: dict[str, Any]
    """Keyword argument that selects the training split."""
    test: dict[str, Any]
    """Keyword argument that selects the test split."""
    files: str
    """Glob of the set's files below torchvision's root."""
    statistics: Statistics


_BY_FLAG: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
TORCHVISION_SETS: dict[str, TorchvisionSet] = {
    "CIFAR10": TorchvisionSet(
        "50,000 training and 10,000 test images of 10 classes, 3 x 32 x 32",
        *_BY_FLAG,
        "cifar-10-batches-py/*",
        Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ),
    "CIFAR100": TorchvisionSet(
        "50,000 training and 10,000 test images of 100 classes, 3 x 32 x 32",
        *_BY_FLAG,
        "cifar-100-python/*",
        Statistics((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ),
    "MNIST": TorchvisionSet(
        "60,000 training and 10,000 test images of 10 classes, 1 x 28 x 28",
        *_BY_FLAG,
        "MNIST/raw/*",
        Statistics((0.1307,), (0.3081,)),
    ),
    "FashionMNIST": TorchvisionSet(
        "60,000 training and 10,000 test images of 10 classes, 1 x 28 x 28",
        *_BY_FLAG,
        "FashionMNIST/raw/*",
        Statistics((0.2860,), (0.3530,)),
    ),
    "SVHN": TorchvisionSet(
        "73,257 training and 26,032 test images of 10 classes, 3 x 32 x 32",
        {"split": "train"},
        {"split": "test"},
        "*_32x32.mat",
        Statistics((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    ),
}


class TorchvisionSource:
    """The data set ``name`` of torchvision, in the folder ``data.root``."""

    settings = ("root",)
    fields = ("root", "download")
    downloads = True

    def __init__(self, name: str) -> None:
        self.name, self.set = name, TORCHVISION_SETS[name]
        self.summary, self.statistics = self.set.summary, self.set.statistics

    def path_setting(self, split: str) -> str:
        """Return ``data.root``, which locates the files of both splits."""
        return "data.root"

    def find_files(self, config: DataConfig, split: str) -> list[Path]:
        """Return the set's files of both splits that are in ``data.root``.

        Raises:
            InputError: ``data.root`` is missing.
        """
        return sorted(path for path in _root(config).glob(self.set.files) if not path.is_dir())

    def open_split(self, config: DataConfig, split: str, paths: Sequence[Path]) -> "TorchvisionReader":
        """Open ``split``; torchvision finds the files itself.

        Raises:
            InputError: see ``TorchvisionReader``.
        """
        return TorchvisionReader(config, split)


class TorchvisionReader:
    """A split of a data set of torchvision, which loads all images into memory.

    Raises:
        InputError: ``data.root`` is missing, or the data set is not in it and ``data.download`` is false.
    """

    def __init__(self, config: DataConfig, split: str) -> None:
        self.config, root = config, _root(config)
        which = getattr(TORCHVISION_SETS[config.name], split)
        remedy = (
            "check the network" if config.download else "set data.download to true, or data.root to a complete copy"
        )
        with guarded("data.root", f"{config.name} cannot be read from {root}; {remedy}"):
            from torchvision import datasets  # takes as long to import as torch

            source = getattr(datasets, config.name)(root, download=config.download, **which)
            self._unpack(source)
        if not self.count or self.images.shape[0] != len(self.labels) or self.images.dtype != np.uint8:
            raise InputError(
                f"data.root: {config.name} in {root} holds {self.images.shape[0]} images of {self.images.dtype} and "
                f"{len(self.labels)} labels for {split}; the files must be complete and belong together"
            )
        if not all(isinstance(label, int) and 0 <= label < len(self.classes) for label in self.labels):
            raise InputError(
                f"data.root: {config.name} in {root} has labels outside of its {len(self.classes)} classes"
            )

    def _unpack(self, source: Any) -> None:
        # SVHN has images [n, channels, height, width], CIFAR [n, height, width, channels], MNIST [n, height, width].
        images = np.asarray(source.data)
        if images.ndim == 3:
            images = images[:, None]
        elif self.config.name != "SVHN":
            images = images.transpose(0, 3, 1, 2)
        labels = np.asarray(source.labels if self.config.name == "SVHN" else source.targets)
        self.images, self.labels, self.count = images, labels.tolist(), len(images)
        self.classes = [str(name) for name in getattr(source, "classes", range(max(self.labels) + 1))]

    def labels_and_paths(self) -> Iterator[tuple[list[int], list[str | None]]]:
        """Yield the labels of all rows in one batch; these images have no paths."""
        yield self.labels, [None] * self.count

    def pixels(self, rows: np.ndarray, shape: tuple[int, ...] | None) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the images of ``rows`` in batches; all images of a set have one shape, so ``shape`` is not used."""
        for start in range(0, len(rows), BATCH):
            part = slice(start, start + BATCH)
            yield part, self._convert(self.images[rows[part]])

    def _convert(self, images: np.ndarray) -> np.ndarray:
        """Return ``images`` with the channels and the size that the settings request."""
        stored_as_gray, size = images.shape[1] == 1, self.config.image_size
        gray = is_gray(self.config, stored_as_gray)
        if gray == stored_as_gray and size in (None, images.shape[2]):
            return images
        arrays = images[:, 0] if stored_as_gray else np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        return np.stack([picture_to_pixels(Image.fromarray(array), gray, size) for array in arrays])


def _root(config: DataConfig) -> Path:
    if config.root is None:
        raise InputError(f"data.root: missing; give the folder of {config.name}, or the folder to download it to")
    return Path(config.root).expanduser().absolute()

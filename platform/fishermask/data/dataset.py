"""What every data set becomes, and finding one by its name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from fishermask.config import DataConfig
from fishermask.data import parquet, torchvision_sets
from fishermask.data.split import Split
from fishermask.errors import InputError
from fishermask.tensors.images import Statistics

EMBEDDED = "fashion_mnist_small"
PARQUET = "parquet"


@dataclass(frozen=True)
class Dataset:
    """A training pool and a test set over the same classes."""

    train: Split
    test: Split
    classes: list[str]
    published: Statistics | None
    """Channel statistics from the literature, where there are any."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """channels, height, width"""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def restrict(self, rows: Tensor, classes: list[int]) -> "Dataset":
        """The training images ``rows`` and the test images of ``classes``, whose labels become 0, 1, 2, ..."""
        renamed = torch.full((len(self.classes),), -1)
        renamed[classes] = torch.arange(len(classes))
        train = self.train.take(rows).relabel(renamed)
        test = self.test.take((renamed[self.test.labels] >= 0).nonzero()[:, 0]).relabel(renamed)
        return Dataset(train, test, [self.classes[c] for c in classes], self.published)


def available() -> list[str]:
    """Names of the data sets."""
    return [EMBEDDED, *torchvision_sets.SETS, PARQUET]


# One run after another in a process usually wants the same images; one data set is all that is kept.
@lru_cache(maxsize=1)
def load(config: DataConfig) -> Dataset:
    """Load a data set into memory.

    Raises:
        InputError: unknown name, a missing file or column, an image that does not decode (with its row), train and
            test that do not match.
    """
    loaders: dict[str, Callable[[DataConfig], Dataset]] = {EMBEDDED: _embedded, PARQUET: _parquet}
    if config.name in loaders:
        dataset = loaders[config.name](config)
    elif config.name in torchvision_sets.SETS:
        train, test, classes, published = torchvision_sets.load(config)
        dataset = Dataset(train, test, classes, published)
    else:
        raise InputError(f"data.name: unknown data set {config.name!r}; there are {', '.join(available())}")
    if dataset.train.images.shape[1:] != dataset.test.images.shape[1:]:
        shapes = [" x ".join(map(str, split.images.shape[1:])) for split in (dataset.train, dataset.test)]
        raise InputError(f"data: training images are {shapes[0]}, test images {shapes[1]}; set data.image_size")
    return dataset


def _embedded(config: DataConfig) -> Dataset:
    folder = Path(str(files("fishermask.data") / "fashion_mnist"))
    train, classes = parquet.read(str(folder / "train.parquet"), "train", config)
    test, _ = parquet.read(str(folder / "test.parquet"), "test", config)
    return Dataset(train, test, classes, torchvision_sets.SETS["FashionMNIST"].statistics)


def _parquet(config: DataConfig) -> Dataset:
    for field in ("train", "test"):
        if getattr(config, field) is None:
            raise InputError(f"data.{field}: missing; give the Parquet file, folder or glob of the {field} images")
    train, classes = parquet.read(str(config.train), "train", config)
    test, test_classes = parquet.read(str(config.test), "test", config)
    shared = min(len(classes), len(test_classes))
    if classes[:shared] != test_classes[:shared]:
        raise InputError(
            f"data.test: its classes are {', '.join(test_classes)}, those of data.train {', '.join(classes)}; "
            "the same number must mean the same class in both"
        )
    return Dataset(train, test, max(classes, test_classes, key=len), None)

"""Loading of a data set by its name, as memory-mapped arrays."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishermask.config import DataConfig, Imbalance
from fishermask.data import cache
from fishermask.data.ids import Ids
from fishermask.data.images import Origin, StoredImages
from fishermask.data.sources import SPLITS, find_source, make_absolute
from fishermask.data.split import Split
from fishermask.data.store import ensure_store, read_metadata
from fishermask.guard import guarded, one_line, short
from fishermask.tensors.images import Statistics


@dataclass(frozen=True)
class Dataset:
    """A training pool and a test set over the same classes."""

    train: Split
    test: Split
    classes: list[str]
    published: Statistics | None
    """Channel statistics from the literature; None if there are none."""
    source_size: tuple[int, int]
    """Numbers of training images and of classes before ``restrict`` was called."""
    hashes: dict[str, str]
    """Hash of the pixels, labels and ids of each split before ``restrict`` was called."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.train.images.shape[1:]

    def restrict(self, rows: Tensor, classes: list[int]) -> "Dataset":
        """Return the data set with the training images ``rows`` and the test images of ``classes``, both ascending.

        The labels of ``classes`` become 0, 1, 2, ...
        """
        new_labels = torch.full((len(self.classes),), -1)
        new_labels[classes] = torch.arange(len(classes))
        train = self.train.take(rows).relabel(new_labels)
        test = self.test.take((new_labels[self.test.labels] >= 0).nonzero()[:, 0]).relabel(new_labels)
        return replace(self, train=train, test=test, classes=[self.classes[c] for c in classes])

    def describe_pool(self, rule: Imbalance) -> list[str]:
        """Return one line with the sizes of the pool that ``rule`` selected and of the data set.

        A second line follows if classes of the pool have no test images.
        """
        num_images, num_classes = self.source_size
        images = _count(len(self.train.labels), num_images, "training image", "training images")
        classes = _count(len(self.classes), num_classes, "class", "classes")
        config = self.train.images.origin.config
        name = config.name if config.train is None else one_line(Path(config.train).name, 80)
        settings = {"kind": rule.kind} | rule.model_dump(exclude_defaults=True)
        values = [f"{key}: {_yaml_text(value)}" for key, value in settings.items()]
        label = rule.kind if len(settings) == 1 else one_line(f"{{{', '.join(values)}}}", 120)
        lines = [f"pool: {images} of {name}, {classes} (imbalance: {label})"]
        sizes = torch.bincount(self.test.labels, minlength=len(self.classes)).tolist()
        if missing := [name for name, size in zip(self.classes, sizes, strict=True) if not size]:
            noun, pronoun = ("class", "it") if len(missing) == 1 else ("classes", "them")
            names = one_line(", ".join(missing), 120)
            lines.append(f"data.test: no images of {noun} {names}; the metrics leave {pronoun} out")
        return lines


def _count(size: int, total: int, singular: str, plural: str) -> str:
    number = f"{size:,}" if size == total else f"{size:,} of {total:,}"
    return f"{number} {singular if total == 1 else plural}"


def _yaml_text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def load_dataset(config: DataConfig) -> Dataset:
    """Map a data set's store, and decode the data set into its store first if this machine has none.

    Raises:
        InputError: unknown name, a missing file or column, an image that does not decode (with its row), train and
            test data that do not match, or a cache that cannot be written to.
    """
    with guarded("data", f"the data set {short(config.name)} cannot be read"):
        folder = ensure_store(config)
        metadata = read_metadata(folder)
    train, test = (_map_split(folder, metadata, split, make_absolute(config)) for split in SPLITS)
    classes = metadata["classes"]
    size = len(train.labels), len(classes)
    return Dataset(train, test, classes, _published_statistics(config), size, metadata["hashes"])


def _published_statistics(config: DataConfig) -> Statistics | None:
    statistics = find_source(config).statistics
    num_channels = {"keep": None, "gray": 1, "rgb": 3}[config.channels]
    if statistics is None or num_channels in (None, len(statistics.mean)):
        return statistics
    # Repeated gray channels have the statistics of the gray channel. Statistics of RGB do not determine those of luma.
    return Statistics(statistics.mean * 3, statistics.std * 3) if num_channels == 3 else None


def _map_split(folder: Path, metadata: dict[str, Any], split: str, config: DataConfig) -> Split:
    # Copy on write: a tensor that is modified by mistake must not change the store or end the process.
    array, names = cache.map_array(folder / split / cache.LABELS, "c"), cache.map_array(folder / split / cache.IDS)
    images, order = (cache.map_array(folder / split / name) for name in (cache.IMAGES, cache.SOURCE_ROWS))
    count, shape = len(array), tuple(metadata["shape"])
    shapes = [array.shape, names.shape, images.shape, order.shape]
    if shapes != [(count,), (count,), (count, *shape), (count,)] or names.dtype.kind != "S":
        raise cache.damaged_store_error(folder, f"the arrays of {split} do not match")
    if array.dtype != np.int64 or images.dtype != np.uint8 or order.dtype != np.int64:
        raise cache.damaged_store_error(folder, f"the arrays of {split} have other types")
    if count and not 0 <= array.min() <= array.max() < len(metadata["classes"]):
        raise cache.damaged_store_error(folder, f"{split} has labels outside of its classes")
    files = tuple((path, size) for path, size, _ in metadata["files"][split])
    origin = Origin(folder, split, config, files, count, shape)
    return Split(StoredImages(origin, range(count)), torch.from_numpy(array), Ids(names, range(count)))

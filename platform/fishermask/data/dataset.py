"""What every data set becomes, and finding one by its name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishermask.config import DataConfig
from fishermask.data import cache, sources, store
from fishermask.data.ids import Ids
from fishermask.data.images import Origin, StoredImages
from fishermask.data.split import Split
from fishermask.guard import guarded, short
from fishermask.tensors.images import Statistics


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
        return self.train.images.shape[1:]

    def restrict(self, rows: Tensor, classes: list[int]) -> "Dataset":
        """The training images ``rows``, ascending, and the test images of ``classes``, also ascending.

        The labels of ``classes`` become 0, 1, 2, ...
        """
        renamed = torch.full((len(self.classes),), -1)
        renamed[classes] = torch.arange(len(classes))
        train = self.train.take(rows).relabel(renamed)
        test = self.test.take((renamed[self.test.labels] >= 0).nonzero()[:, 0]).relabel(renamed)
        return Dataset(train, test, [self.classes[c] for c in classes], self.published)


def load(config: DataConfig) -> Dataset:
    """Map a data set's store, which is made first where this machine has none. No image is read here.

    Raises:
        InputError: unknown name, a missing file or column, an image that does not decode (with its row), train and
            test that do not match, a cache that cannot be written to.
    """
    with guarded("data", f"the data set {short(config.name)} cannot be read"):
        folder = store.ensure(config)
        note = store.read_note(folder)
    train, test = (_split(folder, note, split, sources.absolute(config)) for split in sources.SPLITS)
    return Dataset(train, test, note["classes"], sources.published(config))


def _split(folder: Path, note: dict[str, Any], split: str, config: DataConfig) -> Split:
    # Copy on write: a tensor that somebody writes to by mistake must not change the store, nor end the process.
    array, names = cache.mapped(folder / split / cache.LABELS, "c"), cache.mapped(folder / split / cache.IDS)
    images, order = cache.mapped(folder / split / cache.IMAGES), cache.mapped(folder / split / cache.SOURCE_ROWS)
    shape = tuple(note["shape"])
    found = [array.shape, names.shape, images.shape, order.shape]
    if found != [(len(array),), (len(array),), (len(array), *shape), (len(array),)] or names.dtype.kind != "S":
        raise cache.damaged(folder, f"the arrays of {split} do not match")
    if array.dtype != np.int64 or images.dtype != np.uint8 or order.dtype != np.int64:
        raise cache.damaged(folder, f"the arrays of {split} have other types")
    if len(array) and not 0 <= array.min() <= array.max() < len(note["classes"]):
        raise cache.damaged(folder, f"the labels of {split} are not those of its classes")
    labels = torch.from_numpy(array)
    files = tuple((path, size) for path, size, _ in note["files"][split])
    origin = Origin(folder, split, config, files, len(labels), shape)
    rows = range(len(labels))
    return Split(StoredImages(origin, rows), labels, Ids(names, rows))

"""What every data set becomes, and finding one by its name."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishermask.config import DataConfig
from fishermask.data import cache, sources, store
from fishermask.data.ids import Ids
from fishermask.data.images import Origin, StoredImages
from fishermask.data.split import Split
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
    folder = store.ensure(config)
    note = json.loads((folder / cache.NOTE).read_text())
    train, test = (_split(folder, note, split, sources.absolute(config)) for split in sources.SPLITS)
    return Dataset(train, test, note["classes"], sources.published(config))


def _split(folder: Path, note: dict[str, Any], split: str, config: DataConfig) -> Split:
    # Copy on write: a tensor that somebody writes to by mistake must not change the store, nor end the process.
    labels = torch.from_numpy(cache.mapped(folder / split / cache.LABELS, "c"))
    files = tuple((path, size) for path, size, _ in note["files"][split])
    origin = Origin(folder, split, config, files, len(labels), tuple(note["shape"]))
    rows = range(len(labels))
    return Split(StoredImages(origin, rows), labels, Ids(cache.mapped(folder / split / cache.IDS), rows))

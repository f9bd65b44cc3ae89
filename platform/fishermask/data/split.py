"""Images with their labels and ids."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fishermask.data.ids import BATCH, Ids
from fishermask.data.images import StoredImages
from fishermask.data.rows import compact


@dataclass(frozen=True)
class Split:
    """n images in the order of their ids."""

    images: StoredImages
    """uint8 [n, channels, height, width], read when indexed"""
    labels: Tensor
    """int64 [n]; mapped from a file where it is a run of the store's"""
    ids: Ids
    """What the source calls each image: a path or key, else split and row number."""

    def label_numbers(self) -> Iterator[int]:
        """The labels as plain numbers, a batch at a time in memory."""
        for batch in self.labels.split(BATCH):
            yield from batch.tolist()

    def take(self, rows: Tensor) -> "Split":
        """The images at ``rows``, ascending.

        Raises:
            ValueError: they do not ascend; a split without the order of its ids could not be searched.
        """
        if not (rows[1:] > rows[:-1]).all():
            raise ValueError("rows must ascend")
        run = compact(rows.numpy())
        chosen = slice(run.start, run.stop) if isinstance(run, range) else rows
        labels = self.labels[chosen]
        # A view of the mapped labels, unless rows are missing: the whole pool then takes no memory.
        return Split(self.images.take(chosen), labels, self.ids.take(chosen))

    def relabel(self, renamed: Tensor) -> "Split":
        """Label c becomes ``renamed[c]``."""
        if torch.equal(renamed, torch.arange(len(renamed))):
            return self
        return replace(self, labels=renamed[self.labels])

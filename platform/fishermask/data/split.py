"""Images with their labels and ids."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fishermask.data.ids import BATCH, Ids
from fishermask.data.images import StoredImages
from fishermask.data.rows import compress_rows


@dataclass(frozen=True)
class Split:
    """n images in the order of their ids."""

    images: StoredImages
    """uint8 [n, channels, height, width], read when indexed"""
    labels: Tensor
    """int64 [n]; a view of the store's file if its rows are consecutive"""
    ids: Ids
    """Names from the source: paths or keys; otherwise split and row number."""

    def label_numbers(self) -> Iterator[int]:
        """Yield the labels as Python integers, with one batch at a time in memory."""
        for batch in self.labels.split(BATCH):
            yield from batch.tolist()

    def take(self, rows: Tensor) -> "Split":
        """Return the images at ``rows``, which must ascend.

        Raises:
            ValueError: the rows do not ascend; the ids of the split could then not be searched.
        """
        if not (rows[1:] > rows[:-1]).all():
            raise ValueError("rows must ascend")
        compressed = compress_rows(rows.numpy())
        # A slice of the labels is a view of the file: the pool of all training images takes no memory.
        selection = slice(compressed.start, compressed.stop) if isinstance(compressed, range) else rows
        return Split(self.images.take(selection), self.labels[selection], self.ids.take(selection))

    def relabel(self, new_labels: Tensor) -> "Split":
        """Return the split with ``new_labels[c]`` in place of each label c."""
        if torch.equal(new_labels, torch.arange(len(new_labels))):
            return self
        return replace(self, labels=new_labels[self.labels])

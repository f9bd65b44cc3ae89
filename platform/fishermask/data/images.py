"""Images on disk: views of a store, which are sent between machines as row numbers instead of pixels."""

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishermask.config import DataConfig
from fishermask.data import cache
from fishermask.data.rows import Rows, compress_rows, read_rows, select_rows
from fishermask.data.sources import reopen_split
from fishermask.errors import InputError


@dataclass(frozen=True)
class Origin:
    """The store of a split on the machine that decoded it, and the files of the source."""

    store: Path
    split: str
    config: DataConfig
    """Settings of the data set, with absolute paths."""
    files: tuple[tuple[str, int], ...]
    """Path and size of each file of the source."""
    count: int
    """Number of images of the split."""
    shape: tuple[int, int, int]
    """Channels, height and width of an image."""

    def map_array(self, name: str) -> np.ndarray | None:
        """Return an array of the store; None if this machine does not have the store."""
        for folder in (self.store, cache.cache_folder() / self.store.name):
            if (folder / cache.METADATA).exists():
                return cache.map_array(folder / self.split / name)
        return None


class StoredImages:
    """n images, uint8 [n, channels, height, width]. Indexing with a slice or an index tensor reads a tensor.

    On a machine without the store, the first access decodes the images of this view, and only these, from the source.

    Raises:
        InputError: on the first access, if there is no store and the source is missing or has changed.
    """

    def __init__(self, origin: Origin, rows: Rows, source_rows: Rows | None = None) -> None:
        self.origin, self.rows, self._source_rows = origin, rows, source_rows
        # Mapped now if possible, because the store may be deleted while it is in use.
        self._array, self._order = origin.map_array(cache.IMAGES), origin.map_array(cache.SOURCE_ROWS)
        self._array_rows = rows

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Number of images, channels, height and width."""
        return len(self), *self.origin.shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, selection: slice | Tensor) -> Tensor:
        if self._array is None:
            self._array, self._array_rows = self._decode_from_source(), range(len(self))
        return torch.from_numpy(read_rows(self._array, select_rows(self._array_rows, selection)))

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredImages, (self.origin, self.rows, self.source_rows())

    def take(self, selection: slice | Tensor) -> "StoredImages":
        """Return a view of the images at a slice or an index tensor, without reading them."""
        view = object.__new__(StoredImages)
        rows, array_rows = select_rows(self.rows, selection), select_rows(self._array_rows, selection)
        vars(view).update(vars(self), rows=rows, _array_rows=array_rows)
        if self._source_rows is not None:
            view._source_rows = select_rows(self._source_rows, selection)
        return view

    def narrow(self, dim: int, start: int, length: int) -> "StoredImages":
        """Return a view of ``length`` images from ``start``, like ``Tensor.narrow``.

        Raises:
            ValueError: ``dim`` is not 0.
        """
        if dim != 0:
            raise ValueError(f"expected dim 0, got {dim}")
        return self.take(slice(start, start + length))

    def source_rows(self) -> Rows:
        """Return the rows of the source that hold the images, in the view's order."""
        if self._source_rows is None:
            assert self._order is not None
            self._source_rows = compress_rows(read_rows(self._order, self.rows))
        return self._source_rows

    def _decode_from_source(self) -> np.ndarray:
        origin = self.origin
        reader = reopen_split(origin.config, origin.split, origin.files)
        if reader.count != origin.count:
            raise InputError(
                f"data.{origin.split}: the source holds {reader.count} images on {socket.gethostname()}, but "
                f"{origin.count} on the machine where the run began; copy the same files to every machine"
            )
        rows = np.asarray(self.source_rows(), dtype=np.int64)
        order = rows.argsort()
        pixels = np.empty((len(rows), *origin.shape), np.uint8)
        for part, batch in reader.pixels(rows[order], origin.shape):
            pixels[order[part]] = batch
        return pixels

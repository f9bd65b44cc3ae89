"""Images that stay on disk: a view of a store, which travels between machines as row numbers and never as pixels."""

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishermask.config import DataConfig
from fishermask.data import cache, sources
from fishermask.data.rows import Rows, compact, pick, read
from fishermask.errors import InputError


@dataclass(frozen=True)
class Origin:
    """Where the images of a split are kept on the machine that decoded them, and where they came from."""

    store: Path
    split: str
    config: DataConfig
    """With absolute paths."""
    files: tuple[tuple[str, int], ...]
    """The source's files, path and size."""
    count: int
    shape: tuple[int, int, int]
    """channels, height, width"""

    def mapped(self, name: str) -> np.ndarray | None:
        """An array of the store, where this machine has it."""
        for folder in (self.store, cache.root() / self.store.name):
            if (folder / cache.NOTE).exists():
                return cache.mapped(folder / self.split / name)
        return None


class StoredImages:
    """n images, uint8 [n, channels, height, width]. Indexing with a slice or an index tensor reads a tensor.

    On a machine without the store, what is indexed first reads this view's own images, and no others, from the source.

    Raises:
        InputError: on first indexing: no store, and the source is not there either, or is another.
    """

    def __init__(self, origin: Origin, rows: Rows, source_rows: Rows | None = None) -> None:
        self.origin, self.rows, self._source_rows = origin, rows, source_rows
        # Mapped at once where it can be: a store may be deleted while it is in use.
        self._array, self._order = origin.mapped(cache.IMAGES), origin.mapped(cache.SOURCE_ROWS)
        self._index = rows  # into the array

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """n, channels, height, width"""
        return len(self), *self.origin.shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, selection: slice | Tensor) -> Tensor:
        if self._array is None:
            self._array, self._index = self._from_source(), range(len(self))
        return torch.from_numpy(read(self._array, pick(self._index, selection)))

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredImages, (self.origin, self.rows, self.source_rows())

    def take(self, selection: slice | Tensor) -> "StoredImages":
        """A view of the images at a slice or an index tensor; nothing is read."""
        view = object.__new__(StoredImages)
        vars(view).update(vars(self), rows=pick(self.rows, selection), _index=pick(self._index, selection))
        if self._source_rows is not None:
            view._source_rows = pick(self._source_rows, selection)
        return view

    def narrow(self, dim: int, start: int, length: int) -> "StoredImages":
        """As ``Tensor.narrow``: a view of ``length`` images from ``start``.

        Raises:
            ValueError: ``dim`` is not 0.
        """
        if dim != 0:
            raise ValueError(f"only images can be cut, dim 0; got dim {dim}")
        return self.take(slice(start, start + length))

    def source_rows(self) -> Rows:
        """The rows of the source that the images stand in, in the view's order."""
        if self._source_rows is None:
            assert self._order is not None
            self._source_rows = compact(read(self._order, self.rows))
        return self._source_rows

    def _from_source(self) -> np.ndarray:
        origin = self.origin
        source = sources.reopen(origin.config, origin.split, origin.files)
        if source.count != origin.count:
            raise InputError(
                f"data.{origin.split}: its source holds {source.count} images on {socket.gethostname()}, "
                f"but {origin.count} where the run began; bring the same files to every machine"
            )
        rows = np.asarray(self.source_rows(), dtype=np.int64)
        order = rows.argsort()
        pixels = np.empty((len(rows), *origin.shape), np.uint8)
        for part, batch in source.pixels(rows[order], origin.shape):
            pixels[order[part]] = batch
        return pixels

"""The ids of a split, found by binary search in a sorted file instead of a dictionary in memory."""

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import torch
from torch import Tensor

from fishermask.data.rows import Rows, pick, read

BATCH = 4096


class Ids(Sequence[str]):
    """n ids in ascending order of their bytes.

    Args:
        names: all ids of the store, sorted, fixed-width utf-8 bytes.
        rows: which of them these are, ascending.
    """

    def __init__(self, names: np.ndarray, rows: Rows) -> None:
        self._names, self._rows = names, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [name.decode() for name in read(self._names, self._rows[index]).tolist()]
        return bytes(self._names[self._rows[index]]).decode()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BATCH):
            yield from self[start : start + BATCH]

    def __reduce__(self) -> tuple[type["Ids"], tuple[np.ndarray, range]]:
        # A mapped array would be pickled whole.
        return Ids, (read(self._names, self._rows), range(len(self)))

    def take(self, rows: slice | Tensor) -> "Ids":
        """The ids at ``rows``, which ascend."""
        return Ids(self._names, pick(self._rows, rows))

    def positions(self, names: Sequence[str]) -> Tensor:
        """Where each of ``names`` stands, int64 [m]; -1 for one that is not there."""
        if not len(self):
            return torch.full((len(names),), -1)
        encoded = [name.encode() for name in names]
        # Of the file's own width: a wider array would make numpy convert, and so copy, the whole file.
        fits = np.array([len(name) <= self._names.itemsize for name in encoded], dtype=bool)
        wanted = np.array(encoded, dtype=self._names.dtype)
        rows = np.searchsorted(self._names, wanted).clip(max=len(self._names) - 1)
        here = fits & (self._names[rows] == wanted)
        if isinstance(self._rows, range):
            found = rows - self._rows.start
            here &= (found >= 0) & (found < len(self))
        else:
            found = np.searchsorted(self._rows, rows).clip(max=len(self) - 1)
            here &= self._rows[found] == rows
        return torch.from_numpy(np.where(here, found, -1))

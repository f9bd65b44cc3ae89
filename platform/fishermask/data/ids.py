"""The ids of a split. A binary search in a sorted file finds an id, without a dictionary in memory."""

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import torch
from torch import Tensor

from fishermask.data.rows import Rows, read_rows, select_rows

BATCH = 4096
"""Ids decoded per batch."""


class Ids(Sequence[str]):
    """n ids in ascending order of their bytes.

    Args:
        names: all ids of the store, sorted, fixed-width utf-8 bytes.
        rows: rows of ``names`` that belong to this sequence, ascending.
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
            return [name.decode() for name in read_rows(self._names, self._rows[index]).tolist()]
        return bytes(self._names[self._rows[index]]).decode()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BATCH):
            yield from self[start : start + BATCH]

    def __reduce__(self) -> tuple[type["Ids"], tuple[np.ndarray, range]]:
        # A memory-mapped array would be pickled with all ids of the store.
        return Ids, (read_rows(self._names, self._rows), range(len(self)))

    def take(self, rows: slice | Tensor) -> "Ids":
        """Return the ids at ``rows``, which must ascend."""
        return Ids(self._names, select_rows(self._rows, rows))

    def positions(self, names: Sequence[str]) -> Tensor:
        """Return the position of each of ``names``, int64 [m]; -1 for a name that is not in the sequence."""
        if not len(self):
            return torch.full((len(names),), -1)
        encoded = [name.encode() for name in names]
        # The queries have the item size of the file; with a larger item size, numpy would convert a copy of the file.
        fits = np.array([len(name) <= self._names.itemsize for name in encoded], dtype=bool)
        queries = np.array(encoded, dtype=self._names.dtype)
        rows = np.searchsorted(self._names, queries).clip(max=len(self._names) - 1)
        is_member = fits & (self._names[rows] == queries)
        if isinstance(self._rows, range):
            positions = rows - self._rows.start
            is_member &= (positions >= 0) & (positions < len(self))
        else:
            positions = np.searchsorted(self._rows, rows).clip(max=len(self) - 1)
            is_member &= self._rows[positions] == rows
        return torch.from_numpy(np.where(is_member, positions, -1))

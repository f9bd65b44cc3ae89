"""Which rows of an array on disk a view shows. A run of rows is a ``range``, so that a whole pool costs nothing."""

import numpy as np
from torch import Tensor

Rows = range | np.ndarray


def compact(rows: np.ndarray) -> Rows:
    """``rows`` [n], as a range where they follow one another."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows) and (rows[1:] > rows[:-1]).all():
        return range(int(rows[0]), int(rows[-1]) + 1)
    return rows


def pick(rows: Rows, selection: slice | Tensor) -> Rows:
    """Those of ``rows`` that a slice or an index tensor [m] of any order selects.

    Raises:
        IndexError: an index outside of ``rows``.
    """
    if isinstance(selection, slice):
        return rows[selection]
    index = selection.cpu().numpy().astype(np.int64, casting="safe", copy=False)
    # A negative index would reach into rows before the view's first.
    if len(index) and not 0 <= index.min() <= index.max() < len(rows):
        raise IndexError(f"indices {index.min()} to {index.max()} into {len(rows)} rows")
    return compact(rows.start + index * rows.step if isinstance(rows, range) else rows[index])


def read(array: np.ndarray, rows: Rows) -> np.ndarray:
    """A copy of ``array[rows]``: what is read may be written to, the file may not."""
    if isinstance(rows, range) and rows.step == 1:
        return np.array(array[rows.start : rows.stop])
    return np.array(array[np.asarray(rows, dtype=np.int64)])

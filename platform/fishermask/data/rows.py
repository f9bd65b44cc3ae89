"""Row numbers of a view in the array on disk. Consecutive rows are a ``range``, which takes no memory."""

import numpy as np
from torch import Tensor

Rows = range | np.ndarray


def compress_rows(rows: np.ndarray) -> Rows:
    """Return ``rows`` [n] as a range if they are consecutive, otherwise unchanged."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows) and (rows[1:] > rows[:-1]).all():
        return range(int(rows[0]), int(rows[-1]) + 1)
    return rows


def select_rows(rows: Rows, selection: slice | Tensor) -> Rows:
    """Return the members of ``rows`` at a slice or at an index tensor [m] in any order.

    Raises:
        IndexError: an index outside of ``rows``.
    """
    if isinstance(selection, slice):
        return rows[selection]
    index = selection.cpu().numpy().astype(np.int64, casting="safe", copy=False)
    # A negative index would select a row before the view's first row.
    if len(index) and not 0 <= index.min() <= index.max() < len(rows):
        raise IndexError(f"indices {index.min()} to {index.max()} into {len(rows)} rows")
    return compress_rows(rows.start + index * rows.step if isinstance(rows, range) else rows[index])


def read_rows(array: np.ndarray, rows: Rows) -> np.ndarray:
    """Return a copy of ``array[rows]``, which may be modified without changing the file."""
    if isinstance(rows, range) and rows.step == 1:
        return np.array(array[rows.start : rows.stop])
    return np.array(array[np.asarray(rows, dtype=np.int64)])

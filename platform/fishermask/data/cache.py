"""The folder of decoded data sets on this machine: where it is, who writes there, and arrays mapped from it.

<cache>/<key>/store.json                    what was decoded, and the class names
<cache>/<key>/<split>/images.npy            uint8 [n, channels, height, width], rows sorted by id
<cache>/<key>/<split>/labels.npy            int64 [n]
<cache>/<key>/<split>/ids.npy               fixed-width bytes [n], utf-8
<cache>/<key>/<split>/source_rows.npy       int64 [n], the row of the source that each image stands in

A folder has its name only once it is whole, and never changes after.
"""

import fcntl
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from fishermask.errors import InputError
from fishermask.guard import guarded, reason
from fishermask.paths import check_path, require_file

VARIABLE = "FISHERMASK_CACHE"
NOTE, IMAGES, LABELS, IDS, SOURCE_ROWS = "store.json", "images.npy", "labels.npy", "ids.npy", "source_rows.npy"


def root() -> Path:
    """``$FISHERMASK_CACHE``, else ``$XDG_CACHE_HOME/fishermask``, else ``~/.cache/fishermask``."""
    for variable, folder in ((VARIABLE, ""), ("XDG_CACHE_HOME", "fishermask")):
        if place := os.environ.get(variable):
            try:
                return Path(check_path(place)).expanduser().absolute() / folder
            except ValueError as error:
                raise InputError(f"{variable}: {error}") from None
    with guarded(VARIABLE, "is not set, and there is no home folder"):
        return Path.home().absolute() / ".cache/fishermask"


@contextmanager
def writing(key: str) -> Iterator[None]:
    """Hold the right to write the store ``key``, so that processes that want it at once decode it once.

    What a killed writer left behind is removed. The lock ends with this process at the latest.

    Raises:
        InputError: the cache cannot be written to.
    """
    folder = root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{key}.lock"
        if path.exists():
            require_file(path, VARIABLE)  # to open a FIFO would block
        lock = path.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise InputError(
            f"{VARIABLE}: cannot write decoded images to {folder} ({error.strerror}); set it to a folder that can be"
        ) from None
    with lock:
        for abandoned in folder.glob(f"{key}.*.partial"):
            shutil.rmtree(abandoned, ignore_errors=True)
        yield


@contextmanager
def partial(key: str) -> Iterator[Path]:
    """A new folder that becomes the store ``key`` when the block ends, and vanishes when it raises."""
    with guarded(VARIABLE, f"cannot make a folder in {root()}"):
        folder = Path(tempfile.mkdtemp(prefix=f"{key}.", suffix=".partial", dir=root()))
    try:
        folder.chmod(0o755)
        yield folder
        try:
            folder.rename(root() / key)
        except OSError:
            if not (root() / key).exists():
                raise
            # Where locks do not hold (some network file systems) another may have been faster, with the same content.
            if not (root() / key / NOTE).exists():
                raise damaged(root() / key, f"it has no {NOTE}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def allocate(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """Make an array file with all its room on disk: a mapped file that outgrows the disk would kill the process.

    Raises:
        InputError: there is not enough room.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise InputError(
            f"{VARIABLE}: {root()} cannot hold {size / 1e6:,.0f} MB of decoded images ({error.strerror}); "
            "make room, or set it to another folder"
        ) from None


def put(path: Path, rows: slice | np.ndarray, values: np.ndarray) -> None:
    """Write ``values`` to ``rows`` of an array file, mapped for no longer than that takes."""
    np.lib.format.open_memmap(path, mode="r+")[rows] = values


def mapped(path: Path, mode: Literal["r", "c"] = "r") -> np.ndarray:
    """An array of a store, in the page cache that all processes of this machine share.

    Raises:
        InputError: the file is missing or cut short.
    """
    store = path.parent.parent
    try:
        require_file(path, VARIABLE)
        return np.asarray(np.load(path, mmap_mode=mode, allow_pickle=False))
    except Exception as error:  # numpy raises nearly anything for a file that is no array
        raise damaged(store, reason(error)) from error


def damaged(store: Path, reason: str) -> InputError:
    """Return the error of a store whose content is not what was written there."""
    return InputError(f"{VARIABLE}: {store} is damaged ({reason}); remove it, it will be made again")

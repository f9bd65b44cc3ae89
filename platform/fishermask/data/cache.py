"""The folder of decoded data sets on this machine: its location, its lock, and the arrays mapped from it.

<cache>/<key>/store.json                    description of the store, class names, image shape, hash of each split
<cache>/<key>/<split>/images.npy            uint8 [n, channels, height, width], rows sorted by id
<cache>/<key>/<split>/labels.npy            int64 [n]
<cache>/<key>/<split>/ids.npy               fixed-width bytes [n], utf-8
<cache>/<key>/<split>/source_rows.npy       int64 [n], row of the source that holds each image

A folder gets the name ``<key>`` only when the store is complete. A store does not change afterwards.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock

from fishermask.errors import InputError
from fishermask.guard import guarded, reason
from fishermask.paths import check_path, require_file

VARIABLE = "FISHERMASK_CACHE"
METADATA = "store.json"
IMAGES, LABELS, IDS, SOURCE_ROWS = "images.npy", "labels.npy", "ids.npy", "source_rows.npy"
ZEROS = bytes(2**20)


def cache_folder() -> Path:
    """Return ``$FISHERMASK_CACHE``, else ``$XDG_CACHE_HOME/fishermask``, else ``~/.cache/fishermask``."""
    for variable, subfolder in ((VARIABLE, ""), ("XDG_CACHE_HOME", "fishermask")):
        if value := os.environ.get(variable):
            try:
                return Path(check_path(value)).expanduser().absolute() / subfolder
            except ValueError as error:
                raise InputError(f"{variable}: {error}") from None
    with guarded(VARIABLE, "is not set, and there is no home folder"):
        return Path.home().absolute() / ".cache/fishermask"


@contextmanager
def lock_store(key: str) -> Iterator[None]:
    """Hold the lock of the store ``key``, so that only one process at a time decodes its data set.

    The operating system releases the lock when the process ends. Unfinished files of killed processes are removed.

    Raises:
        InputError: the cache cannot be written to.
    """
    folder = cache_folder()
    path = folder / f"{key}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()  # FileLock would wait forever for a file that cannot be created
        require_file(path, VARIABLE)
        lock = FileLock(path).acquire()
    except OSError as error:
        raise InputError(
            f"{VARIABLE}: cannot write decoded images to {folder} ({error.strerror}); set it to a writable folder"
        ) from None
    with lock:
        for abandoned in folder.glob(f"{key}.*.partial"):
            shutil.rmtree(abandoned, ignore_errors=True)
        yield


@contextmanager
def create_store(key: str) -> Iterator[Path]:
    """Yield a new folder that becomes the store ``key`` when the block ends, and is removed when the block raises."""
    store = cache_folder() / key
    with guarded(VARIABLE, f"cannot make a folder in {store.parent}"):
        folder = Path(tempfile.mkdtemp(prefix=f"{key}.", suffix=".partial", dir=store.parent))
    try:
        folder.chmod(0o755)
        yield folder
        try:
            folder.rename(store)
        except OSError:
            if not store.exists():
                raise
            # On file systems without locks, another process may have written the same store first.
            if not (store / METADATA).exists():
                raise damaged_store_error(store, f"it has no {METADATA}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def allocate_array(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """Create an array file and reserve its disk space: a full disk would end a process that writes to a mapped file.

    Raises:
        InputError: the disk has too little space.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        with path.open("r+b") as file:
            end = path.stat().st_size
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, end)
            else:  # macOS and Windows
                file.seek(end - size)
                for start in range(0, size, len(ZEROS)):
                    file.write(ZEROS[: size - start])
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise InputError(
            f"{VARIABLE}: {cache_folder()} cannot hold {size / 1e6:,.0f} MB of decoded images ({error.strerror}); "
            "make room, or set it to another folder"
        ) from None


def write_rows(path: Path, rows: slice | np.ndarray, values: np.ndarray) -> None:
    """Write ``values`` to ``rows`` of an array file; map the file only during the call."""
    np.lib.format.open_memmap(path, mode="r+")[rows] = values


def map_array(path: Path, mode: Literal["r", "c"] = "r") -> np.ndarray:
    """Return an array of a store, mapped from the page cache that all processes of this machine share.

    Args:
        mode: ``"r"`` for a read-only array, ``"c"`` for one whose changes stay in this process.

    Raises:
        InputError: the file is missing or truncated.
    """
    try:
        require_file(path, VARIABLE)
        return np.asarray(np.load(path, mmap_mode=mode, allow_pickle=False))
    except Exception as error:  # numpy raises exceptions of many types for a damaged file
        raise damaged_store_error(path.parent.parent, reason(error)) from error


def damaged_store_error(store: Path, reason: str) -> InputError:
    """Return the error for a store whose content has changed since it was written."""
    return InputError(f"{VARIABLE}: {store} is damaged ({reason}); remove it, and the next run decodes it again")

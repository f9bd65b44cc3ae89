"""Decoding of a data set into its store: once per machine, sorted by id, with one batch of images in memory at a time.

Because rows are sorted by id, the order in which a source lists its images does not affect results.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from fishermask.config import DataConfig
from fishermask.data import cache
from fishermask.data.sources import SPLITS, SplitReader, find_source
from fishermask.errors import InputError
from fishermask.guard import reason
from fishermask.paths import require_file

FORMAT = 3
"""Version of the content of stores. Increase it when a change decodes the same source into other arrays or metadata."""
DECODING_SETTINGS = {"name", "image_column", "label_column", "channels", "image_size"}
"""Fields of ``DataConfig`` that the content of a store depends on."""
BATCH = 65_536
"""Ids and labels processed per batch."""


def ensure_store(config: DataConfig) -> Path:
    """Return the folder of the data set's store, and create the store first if it does not exist.

    Raises:
        InputError: the source or the cache cannot be used, or the source changed while it was read.
    """
    description = describe_store(config)
    folder = cache.cache_folder() / store_key(description)
    if (folder / cache.METADATA).exists():
        return folder
    with cache.lock_store(folder.name):
        if (folder / cache.METADATA).exists():
            return folder
        source = find_source(config)
        readers = {split: source.open_split(config, split, source.find_files(config, split)) for split in SPLITS}
        description = describe_store(config)  # again: opening the splits may have downloaded the files
        key = store_key(description)
        with cache.create_store(key) as unfinished:
            content = _write_store(unfinished, readers)
            if store_key(describe_store(config)) != key:
                raise InputError("data: its files changed while they were read; run the same command again")
            metadata = unfinished / cache.METADATA
            metadata.write_text(json.dumps(description | content, indent=1))
            # After a power failure, a store must not look complete while parts of it are missing.
            for path in [*unfinished.glob("*/*.npy"), metadata]:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        return cache.cache_folder() / key


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a store: its description, class names, image shape, and a hash of each split.

    Raises:
        InputError: the file does not have the content that ``ensure_store`` writes.
    """
    path = folder / cache.METADATA
    try:
        require_file(path, cache.VARIABLE)
        metadata = json.loads(path.read_text())
        valid = all(isinstance(name, str) for name in metadata["classes"]) and len(metadata["shape"]) == 3
        valid = valid and all(isinstance(size, int) for size in metadata["shape"])
        valid = valid and all(isinstance(metadata["hashes"][split], str) for split in SPLITS)
        valid = valid and all(len(file) == 3 for split in SPLITS for file in metadata["files"][split])
    except Exception as error:  # the file may contain anything
        raise cache.damaged_store_error(folder, reason(error)) from error
    if not valid:
        raise cache.damaged_store_error(folder, f"{cache.METADATA} has other content")
    return dict(metadata)


def describe_store(config: DataConfig) -> dict[str, Any]:
    """Return what determines the content of a store: path, size and time of each file, and the decoding settings.

    Raises:
        InputError: a file is missing or is not a regular file.
    """
    source = find_source(config)
    files = {}
    for split in SPLITS:
        paths = source.find_files(config, split)
        stats = [require_file(path, source.path_setting(split)) for path in paths]
        files[split] = [
            [str(path.absolute()), stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats, strict=True)
        ]
    return {"format": FORMAT, "settings": config.model_dump(include=DECODING_SETTINGS), "files": files}


def store_key(description: dict[str, Any]) -> str:
    """Return the name of the store with this description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:24]


def _write_store(folder: Path, readers: dict[str, SplitReader]) -> dict[str, Any]:
    """Write the arrays of both splits; return the class names, the image shape, and a hash of each split.

    Raises:
        InputError: an image or a label cannot be used, or the splits do not match.
    """
    for split in SPLITS:
        (folder / split).mkdir()
    # Pixels last: an error in the labels is then reported within seconds.
    orders, classes = {}, {}
    for split, reader in readers.items():
        orders[split], classes[split] = _write_labels_and_ids(reader, split, folder / split)
    shared = min(map(len, classes.values()))
    if classes["train"][:shared] != classes["test"][:shared]:
        raise InputError(
            f"data.test: its classes are {', '.join(classes['test'])}, but the classes of data.train are "
            f"{', '.join(classes['train'])}; a label must mean the same class in both"
        )
    # The image with the lowest id determines whether a split is gray or color, so the order of the source does not.
    first = {split: next(iter(readers[split].pixels(orders[split][:1], None)))[1] for split in SPLITS}
    train_shape, test_shape = first["train"].shape[1:], first["test"].shape[1:]
    if train_shape != test_shape:
        sizes = [" x ".join(map(str, shape)) for shape in (train_shape, test_shape)]
        setting = "data.image_size" if train_shape[0] == test_shape[0] else "data.channels"
        raise InputError(f"data: training images are {sizes[0]}, but test images are {sizes[1]}; set {setting}")
    for split in SPLITS:
        _write_images(readers[split], orders[split], train_shape, folder / split / cache.IMAGES)
    hashes = {split: _hash_split(folder / split) for split in SPLITS}
    return {"classes": max(classes.values(), key=len), "shape": list(train_shape), "hashes": hashes}


def _write_labels_and_ids(reader: SplitReader, split: str, folder: Path) -> tuple[np.ndarray, list[str]]:
    """Write labels, ids and source rows. Return the rows of the source, ordered by id, and the class names."""
    labels, width, has_paths, row = np.empty(reader.count, np.int64), 1, True, 0
    for batch, paths in reader.labels_and_paths():
        labels[row : row + len(batch)] = batch
        row += len(batch)
        has_paths = has_paths and None not in paths
        width = max(width, *(len((path or "").encode()) for path in paths))
    if row != reader.count:
        raise InputError(
            f"data.{split}: its files hold {row} images, but their metadata say {reader.count}; write the files again"
        )
    order = _write_sorted_paths(reader, width, folder / cache.IDS) if has_paths else None
    if order is None:
        order = np.arange(reader.count)
        _write_row_numbers(split, reader.count, folder / cache.IDS)
    for name, values in ((cache.LABELS, labels[order]), (cache.SOURCE_ROWS, order)):
        cache.allocate_array(folder / name, "<i8", values.shape)
        cache.write_rows(folder / name, slice(None), values)
    count = max(int(labels.max()) + 1, len(reader.classes))
    return order, reader.classes + [str(c) for c in range(len(reader.classes), count)]


def _write_sorted_paths(reader: SplitReader, width: int, target: Path) -> np.ndarray | None:
    """Write the sorted paths as ids; return the rows in that order, or None if two rows have the same path."""
    unsorted = target.with_name("unsorted.npy")
    for path in (unsorted, target):
        cache.allocate_array(path, f"S{width}", (reader.count,))
    row = 0
    for _, paths in reader.labels_and_paths():
        names = np.array([str(path).encode() for path in paths], f"S{width}")
        cache.write_rows(unsorted, slice(row, row + len(paths)), names)
        row += len(paths)
    names = cache.map_array(unsorted)
    order = names.argsort(kind="stable")
    previous = b""
    for start in range(0, len(order), BATCH):
        batch = names[order[start : start + BATCH]]
        if (batch[1:] == batch[:-1]).any() or (start and batch[0] == previous):
            return None
        cache.write_rows(target, slice(start, start + len(batch)), batch)
        previous = batch[-1]
    unsorted.unlink()
    return order


def _write_row_numbers(split: str, count: int, target: Path) -> None:
    """Write row numbers as ids, such as ``train-00000042``, padded so that they sort by row."""
    digits = max(8, len(str(count - 1)))
    target.with_name("unsorted.npy").unlink(missing_ok=True)
    cache.allocate_array(target, f"S{len(split) + 1 + digits}", (count,))
    for start in range(0, count, BATCH):
        stop = min(start + BATCH, count)
        names = [f"{split}-{row:0{digits}d}".encode() for row in range(start, stop)]
        cache.write_rows(target, slice(start, stop), np.array(names))


def _write_images(reader: SplitReader, order: np.ndarray, shape: tuple[int, ...], target: Path) -> None:
    """Decode all images and write each to its position in ``order``."""
    cache.allocate_array(target, "|u1", (len(order), *shape))
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    # Images are decoded in the order of the source, so that each file is read once from start to end.
    for part, pixels in reader.pixels(np.arange(len(order)), shape):
        cache.write_rows(target, position[part], pixels)


def _hash_split(folder: Path) -> str:
    """Return a hash of the pixels, labels and ids of a split, in the order of the ids."""
    digest = hashlib.sha256()
    for name in (cache.IMAGES, cache.LABELS, cache.IDS):
        array = cache.map_array(folder / name)
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()[:12]

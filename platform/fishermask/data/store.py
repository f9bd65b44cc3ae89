"""Decoding a data set into its store: once per machine, in the order of the ids, a batch of images in memory at a time.

Rows are sorted by id, so that the order in which a source happens to list its images decides nothing.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from fishermask.config import DataConfig
from fishermask.data import cache, sources
from fishermask.data.sources import SPLITS, Source
from fishermask.errors import InputError
from fishermask.guard import reason
from fishermask.paths import require_file

FORMAT = 2
"""To be raised when the same source would be decoded into something else."""
BATCH = 65_536
"""Ids and labels handled at once."""


def ensure(config: DataConfig) -> Path:
    """The folder of the data set's store, made first if it is not there.

    Raises:
        InputError: the source or the cache cannot be used, or the source changed while it was read.
    """
    about = describe(config)
    folder = cache.root() / key(about)
    if (folder / cache.NOTE).exists():
        return folder
    with cache.writing(folder.name):
        if (folder / cache.NOTE).exists():
            return folder
        opened = {split: sources.open_split(config, split) for split in SPLITS}
        about = describe(config)  # again: opening may have fetched the files
        with cache.partial(key(about)) as unfinished:
            about |= write(unfinished, opened)
            if key(describe(config)) != key(about):
                raise InputError("data: its files changed while they were read; run the same command again")
            note = unfinished / cache.NOTE
            note.write_text(json.dumps(about, indent=1))
            # A store must not be found whole after a power cut that took half of it.
            for file in [*unfinished.glob("*/*.npy"), note]:
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        return cache.root() / key(about)


def read_note(folder: Path) -> dict[str, Any]:
    """Return what the note of a store says.

    Raises:
        InputError: the note is not one that ``ensure`` wrote.
    """
    path = folder / cache.NOTE
    try:
        require_file(path, cache.VARIABLE)
        note = json.loads(path.read_text())
        whole = all(isinstance(name, str) for name in note["classes"]) and len(note["shape"]) == 3
        whole = whole and all(isinstance(size, int) for size in note["shape"])
        whole = whole and all(len(file) == 3 for split in SPLITS for file in note["files"][split])
    except Exception as error:  # any content is possible
        raise cache.damaged(folder, reason(error)) from error
    if not whole:
        raise cache.damaged(folder, f"{cache.NOTE} has other content")
    return dict(note)


def describe(config: DataConfig) -> dict[str, Any]:
    """All that decides what the store holds: the files by path, size and time, and the settings that decoding reads.

    Raises:
        InputError: a file is not there, or is no regular file.
    """
    stats = {
        split: [(str(f.absolute()), require_file(f, sources.setting(config, split))) for f in found]
        for split in SPLITS
        for found in [sources.files(config, split)]
    }
    return {
        "format": FORMAT,
        "settings": config.model_dump(include={"name", "image_column", "label_column", "image_size"}),
        "files": {split: [[path, s.st_size, s.st_mtime_ns] for path, s in rows] for split, rows in stats.items()},
    }


def key(about: dict[str, Any]) -> str:
    """The store's name."""
    decisive = {field: about[field] for field in ("format", "settings", "files")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:24]


def write(folder: Path, opened: dict[str, Source]) -> dict[str, Any]:
    """Write both splits; the class names and the images' shape.

    Raises:
        InputError: an image or a label that cannot be used, splits that do not match.
    """
    for split in SPLITS:
        (folder / split).mkdir()
    # Everything but the pixels first: a mistake in the labels is found in seconds.
    indexed = {split: _index(opened[split], split, folder / split) for split in SPLITS}
    train_classes, test_classes = (indexed[split][1] for split in SPLITS)
    shared = min(len(train_classes), len(test_classes))
    if train_classes[:shared] != test_classes[:shared]:
        raise InputError(
            f"data.test: its classes are {', '.join(test_classes)}, those of data.train {', '.join(train_classes)}; "
            "the same number must mean the same class in both"
        )
    # The image with the lowest id decides between gray and color, wherever it stands in the source.
    shapes = [next(iter(opened[split].pixels(indexed[split][0][:1], None)))[1].shape[1:] for split in SPLITS]
    if shapes[0] != shapes[1]:
        words = [" x ".join(map(str, shape)) for shape in shapes]
        raise InputError(f"data: training images are {words[0]}, test images {words[1]}; set data.image_size")
    for split in SPLITS:
        _decode(opened[split], indexed[split][0], shapes[0], folder / split / cache.IMAGES)
    return {"classes": max(train_classes, test_classes, key=len), "shape": list(shapes[0])}


def _index(source: Source, split: str, folder: Path) -> tuple[np.ndarray, list[str]]:
    """Write labels, ids and source rows; the source's rows in the order of their ids, and the class names."""
    labels, width, named, row = np.empty(source.count, np.int64), 1, True, 0
    for batch, paths in source.entries():
        labels[row : row + len(batch)] = batch
        row += len(batch)
        named = named and None not in paths
        width = max(width, *(len((path or "").encode()) for path in paths))
    if row != source.count:
        raise InputError(f"data.{split}: its files hold {row} images, but say that they hold {source.count}")
    order = _sort_by_path(source, width, folder / cache.IDS) if named else None
    if order is None:
        order = np.arange(source.count)
        _write_row_numbers(split, source.count, folder / cache.IDS)
    for name, values in ((cache.LABELS, labels[order]), (cache.SOURCE_ROWS, order)):
        cache.allocate(folder / name, "<i8", values.shape)
        cache.put(folder / name, slice(None), values)
    count = max(int(labels.max()) + 1, len(source.classes))
    return order, source.classes + [str(c) for c in range(len(source.classes), count)]


def _sort_by_path(source: Source, width: int, target: Path) -> np.ndarray | None:
    """Write the paths, sorted; the rows in that order, or None where two rows share a path."""
    unsorted = target.with_name("unsorted.npy")
    for path in (unsorted, target):
        cache.allocate(path, f"S{width}", (source.count,))
    row = 0
    for _, paths in source.entries():
        cache.put(unsorted, slice(row, row + len(paths)), np.array([str(p).encode() for p in paths], f"S{width}"))
        row += len(paths)
    names = cache.mapped(unsorted)
    order = names.argsort(kind="stable")
    before = b""
    for start in range(0, len(order), BATCH):
        batch = names[order[start : start + BATCH]]
        if (batch[1:] == batch[:-1]).any() or (start and batch[0] == before):
            return None
        cache.put(target, slice(start, start + len(batch)), batch)
        before = batch[-1]
    unsorted.unlink()
    return order


def _write_row_numbers(split: str, count: int, target: Path) -> None:
    """Ids for a source that names no image: ``train-00000042``, as wide as their order as text needs."""
    digits = max(8, len(str(count - 1)))
    target.with_name("unsorted.npy").unlink(missing_ok=True)
    cache.allocate(target, f"S{len(split) + 1 + digits}", (count,))
    for start in range(0, count, BATCH):
        stop = min(start + BATCH, count)
        names = [f"{split}-{row:0{digits}d}".encode() for row in range(start, stop)]
        cache.put(target, slice(start, stop), np.array(names))


def _decode(source: Source, order: np.ndarray, shape: tuple[int, ...], target: Path) -> None:
    cache.allocate(target, "|u1", (len(order), *shape))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    # In the source's order, which reads each of its files once from start to end.
    for part, pixels in source.pixels(np.arange(len(order)), shape):
        cache.put(target, place[part], pixels)

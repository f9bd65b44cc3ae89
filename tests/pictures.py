"""Parquet files of 120 small gray images, in any order, for tests of stores and views."""

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fishermask.config import DataConfig
from fishermask.data.dataset import Dataset, load_dataset

PIXELS = np.random.default_rng(0).integers(0, 256, (120, 8, 8), np.uint8)
NAMES = [f"{'köln' if i % 3 else 'bonn'}/{i}.png" for i in range(120)]
KIND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SHUFFLED = np.random.default_rng(1).permutation(120).tolist()
BY_NAME = sorted(range(120), key=lambda i: NAMES[i].encode())
SMALL = {"initial": 1, "query": 1, "total": 2}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, order=range(120), names=NAMES, group=30) -> Path:
    """Write 120 gray images of 4 classes in this order."""
    images = [{"bytes": png(PIXELS[i]), "path": names and names[i]} for i in order]
    table = pa.table({"image": pa.array(images, KIND), "label": [i % 4 for i in order]})
    pq.write_table(table, path, row_group_size=group, compression="none")
    return path


def copy_for_test(path: Path) -> Path:
    """Return a copy of a Parquet file, a folder or a glob in another folder: the splits must not share a file."""
    target = path.parent / "test" / path.name
    for file in path.glob("*.parquet") if path.is_dir() else path.parent.glob("*.parquet"):
        copied = target / file.name if path.is_dir() else target.parent / file.name
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, copied)  # with its time, which belongs to the name of the store
    return target


def config(path: Path) -> DataConfig:
    return DataConfig(name="parquet", train=str(path), test=str(copy_for_test(path)))


def load(path: Path) -> Dataset:
    return load_dataset(config(path))


def stores(folder: Path) -> list[Path]:
    return [path for path in (folder / "cache").iterdir() if path.is_dir()]

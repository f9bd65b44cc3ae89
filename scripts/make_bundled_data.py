"""Make the bundled data set: the first 1,000 training and 200 test images of each Fashion-MNIST class.

    apt-get install dataset-fashion-mnist
    python scripts/make_bundled_data.py /usr/share/datasets/fashion-mnist platform/fishermask/data/fashion_mnist

The files' bytes depend on the versions of Arrow and zlib; their *content* does not, and its digest is checked.
"""

import argparse
import gzip
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
SPLITS = {"train": ("train", 1000), "test": ("t10k", 200)}


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, gzipped: magic 0, 0, 8, rank, then one big-endian int32 a dimension."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an IDX file of unsigned bytes")
    rank = content[3]
    shape = np.frombuffer(content, ">i4", rank, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Rows, ascending, of the first ``count`` images of each class."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(len(CLASSES))]))


def table(images: np.ndarray, labels: np.ndarray, rows: np.ndarray, split: str) -> pa.Table:
    """Hugging Face's image layout; an image's path holds its row in the original file."""
    encoded = []
    for row in rows:
        buffer = io.BytesIO()
        Image.fromarray(images[row]).save(buffer, "PNG", optimize=True)
        encoded.append({"bytes": buffer.getvalue(), "path": f"{split}/{row:05d}.png"})
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    return pa.Table.from_arrays([pa.array(encoded, schema[0].type), pa.array(labels[rows], pa.int64())], schema=schema)


def digest(folder: Path) -> str:
    """SHA-256 over path, label and pixels of every image of ``folder``'s files, in order."""
    sha = hashlib.sha256()
    for split in SPLITS:
        for record in pq.read_table(folder / f"{split}.parquet").to_pylist():
            sha.update(f"{record['image']['path']} {record['label']} ".encode())
            sha.update(np.asarray(Image.open(io.BytesIO(record["image"]["bytes"]))).tobytes())
    return sha.hexdigest()


def make(source: Path, target: Path) -> str:
    """Write ``train.parquet`` and ``test.parquet`` from the IDX files in ``source``; return their digest."""
    target.mkdir(parents=True, exist_ok=True)
    for split, (prefix, count) in SPLITS.items():
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        # PNGs are compressed already: row groups without a codec can be read with no further work.
        pq.write_table(
            table(images, labels, first_of_each_class(labels, count), split),
            target / f"{split}.parquet",
            row_group_size=1000,
            compression="none",
            use_dictionary=False,
        )
    return digest(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the four original IDX files")
    parser.add_argument("target", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    print(make(arguments.source, arguments.target))

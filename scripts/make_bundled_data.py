"""Make the bundled data set: the first 1,000 training and 200 test images of each Fashion-MNIST class.

    apt-get install dataset-fashion-mnist
    python scripts/make_bundled_data.py /usr/share/datasets/fashion-mnist platform/fishermask/data/fashion_mnist

The bytes of the files depend on the versions of Arrow and zlib, but their content does not. A test checks the digest of
the content.
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
    """Return the array of a gzipped IDX file: bytes 0, 0, 8 (uint8), rank, then the shape as big-endian int32."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an IDX file of unsigned bytes")
    rank = content[3]
    shape = np.frombuffer(content, ">i4", rank, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Return the rows of the first ``count`` images of each class, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(len(CLASSES))]))


def make_table(images: np.ndarray, labels: np.ndarray, rows: np.ndarray, split: str) -> pa.Table:
    """Return the images in Hugging Face's layout. The path of an image contains its row number in the original file."""
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


def content_digest(folder: Path) -> str:
    """Return the SHA-256 of path, label and pixels of all images in the files of ``folder``, in order."""
    sha = hashlib.sha256()
    for split in SPLITS:
        for record in pq.read_table(folder / f"{split}.parquet").to_pylist():
            sha.update(f"{record['image']['path']} {record['label']} ".encode())
            sha.update(np.asarray(Image.open(io.BytesIO(record["image"]["bytes"]))).tobytes())
    return sha.hexdigest()


def make_files(source: Path, target: Path) -> str:
    """Write ``train.parquet`` and ``test.parquet`` from the IDX files in ``source``; return their digest."""
    target.mkdir(parents=True, exist_ok=True)
    for split, (prefix, count) in SPLITS.items():
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        # PNG files are compressed already.
        pq.write_table(
            make_table(images, labels, first_of_each_class(labels, count), split),
            target / f"{split}.parquet",
            row_group_size=1000,
            compression="none",
            use_dictionary=False,
        )
    return content_digest(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the four original IDX files")
    parser.add_argument("target", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    print(make_files(arguments.source, arguments.target))

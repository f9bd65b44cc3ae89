"""Parquet files in Hugging Face's image layout: a struct column of encoded bytes and a path, and an integer label."""

import glob
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from fishermask.config import DataConfig
from fishermask.data.split import Split, row_ids
from fishermask.errors import InputError

MAX_CLASSES = 100_000
"""Where a file names no classes, a larger label is taken for something else than a class."""


def read(source: str, split: str, config: DataConfig) -> tuple[Split, list[str]]:
    """All images of ``source`` (a file, a folder of ``*.parquet``, or a glob), and the class names.

    Raises:
        InputError: nothing found, not Parquet, a missing column, an image that does not decode or does not fit the
            first one's size, a label that is missing or negative. Names the file and the row.
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    paths: list[str | None] = []
    classes: list[str] = []
    for file in _files(source, split):
        try:
            table = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"data.{split}: {file} cannot be read as Parquet ({error})") from None
        column = _image_column(table.schema_arrow, file, config)
        names = _class_names(table.schema_arrow, config.label_column)
        if classes and names and names != classes:
            raise InputError(f"data.{split}: {file} names other classes than the file before it")
        classes = classes or names
        row = 0
        for batch in table.iter_batches(batch_size=4096, columns=[column, config.label_column]):
            for image, label in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
                images.append(_decode(image, file, row, images[0] if images else None, config.image_size))
                if not isinstance(label, int) or not 0 <= label < (len(classes) or MAX_CLASSES):
                    limit = (len(classes) or MAX_CLASSES) - 1
                    raise InputError(f"data.{split}: {file} row {row}: label must be 0 to {limit}, got {label!r}")
                labels.append(label)
                paths.append(image["path"])
                row += 1
    if not images:
        raise InputError(f"data.{split}: {source} holds no images")
    count = max(max(labels) + 1, len(classes))
    classes += [str(c) for c in range(len(classes), count)]
    named = None not in paths and len(set(paths)) == len(paths)
    ids = [str(path) for path in paths] if named else row_ids(split, len(paths))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Split(pixels, torch.tensor(labels), ids), classes


def _files(source: str, split: str) -> list[Path]:
    path = Path(source).expanduser()
    # Path.glob takes no absolute pattern.
    found = sorted(path.glob("*.parquet")) if path.is_dir() else [Path(f) for f in sorted(glob.glob(str(path)))]  # noqa: PTH207
    if not found:
        raise InputError(f"data.{split}: no Parquet file at {source}")
    return found


def _image_column(schema: pa.Schema, file: Path, config: DataConfig) -> str:
    structs = [
        field.name
        for field in schema
        if pa.types.is_struct(field.type) and {"bytes", "path"} <= {child.name for child in field.type}
    ]
    wanted = config.image_column or (structs[0] if len(structs) == 1 else None)
    if wanted not in structs:
        raise InputError(
            f"data.image_column: {file} has {f'no image column {wanted!r}' if wanted else 'no single image column'}; "
            f"columns of struct<bytes, path> there: {', '.join(structs) or 'none'}"
        )
    if config.label_column not in schema.names or not pa.types.is_integer(schema.field(config.label_column).type):
        integers = [field.name for field in schema if pa.types.is_integer(field.type)]
        raise InputError(
            f"data.label_column: {file} has no integer column {config.label_column!r}; "
            f"integer columns there: {', '.join(integers) or 'none'}"
        )
    return str(wanted)


def _class_names(schema: pa.Schema, label_column: str) -> list[str]:
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        feature = json.loads(text)["info"]["features"][label_column] if text else {}
    except (ValueError, KeyError, TypeError):
        return []  # The note is optional and other tools write it: classes then go by number.
    return [str(name) for name in feature.get("names", [])]


def _decode(
    image: dict[str, bytes] | None, file: Path, row: int, first: np.ndarray | None, size: int | None
) -> np.ndarray:
    try:
        picture: Image.Image = Image.open(io.BytesIO((image or {})["bytes"]))
        # The first image decides between grey and colour; palettes and transparency become colour.
        mode = ("L" if picture.mode in ("L", "1") else "RGB") if first is None else ("L", "RGB")[first.shape[2] == 3]
        picture = picture.convert(mode)
        if size is not None and picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    except (Image.DecompressionBombError, OSError, SyntaxError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"data: {file} row {row}: the image does not decode ({type(error).__name__})") from None
    pixels = np.asarray(picture)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if first is not None and pixels.shape != first.shape:
        raise InputError(
            f"data.image_size: {file} row {row} is {pixels.shape[1]} x {pixels.shape[0]} pixels, the first image "
            f"{first.shape[1]} x {first.shape[0]}; set data.image_size to bring all to one size"
        )
    return pixels

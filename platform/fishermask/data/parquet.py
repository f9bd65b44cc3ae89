"""Parquet files in Hugging Face's image layout: a struct column of encoded bytes and a path, and an integer label."""

import glob
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fishermask.config import DataConfig
from fishermask.errors import InputError

MAX_CLASSES = 100_000
"""Where a file names no classes, a larger label is taken for something else than a class."""
DECODE_BATCH = 256
"""Images decoded at once."""
ENTRY_BATCH = 8192
"""Labels and paths read at once."""


def files(source: str, split: str) -> list[Path]:
    """The files that ``source`` (a file, a folder of ``*.parquet``, or a glob) stands for, sorted.

    Raises:
        InputError: there are none.
    """
    path = Path(source).expanduser()
    # Path.glob takes no absolute pattern.
    found = sorted(path.glob("*.parquet")) if path.is_dir() else [Path(f) for f in sorted(glob.glob(str(path)))]  # noqa: PTH207
    if not found:
        raise InputError(f"data.{split}: no Parquet file at {source}")
    return found


class ParquetSource:
    """The images of a split in one or several Parquet files.

    Raises:
        InputError: nothing in them, not Parquet, a missing column, files that name other classes.
    """

    def __init__(self, paths: Sequence[Path], split: str, config: DataConfig) -> None:
        self.split, self.size, self.label_column = split, config.image_size, config.label_column
        self.classes: list[str] = []
        self.parts: list[tuple[Path, str, int]] = []
        """Each file with its image column and its number of rows."""
        for path in paths:
            file = self._open(path)
            column = _image_column(file.schema_arrow, path, config)
            names = _class_names(file.schema_arrow, config.label_column)
            if self.classes and names and names != self.classes:
                raise InputError(f"data.{split}: {path} names other classes than the file before it")
            self.classes = self.classes or names
            self.parts.append((path, column, file.metadata.num_rows))
        self.count = sum(rows for _, _, rows in self.parts)
        if not self.count:
            raise InputError(f"data.{split}: {', '.join(str(path) for path in paths)} holds no images")

    def entries(self) -> Iterator[tuple[list[int], list[str | None]]]:
        """Labels and paths of all rows; of the images' column only the paths are read.

        Raises:
            InputError: a label that is missing or out of range, with its file and row.
        """
        limit = (len(self.classes) or MAX_CLASSES) - 1
        for path, column, _ in self.parts:
            row = 0
            columns = [f"{column}.path", self.label_column]
            for batch in self._open(path).iter_batches(batch_size=ENTRY_BATCH, columns=columns):
                labels = batch.column(self.label_column).to_pylist()
                for label in labels:
                    if not isinstance(label, int) or not 0 <= label <= limit:
                        raise InputError(
                            f"data.{self.split}: {path} row {row}: label must be 0 to {limit}, got {label!r}"
                        )
                    row += 1
                yield labels, [(image or {}).get("path") for image in batch.column(column).to_pylist()]

    def pixels(self, rows: np.ndarray, shape: tuple[int, ...] | None) -> Iterator[tuple[slice, np.ndarray]]:
        """Decode the ascending ``rows``; only row groups that hold some of them are read.

        Raises:
            InputError: an image that does not decode or is not of ``shape``, with its file and row.
        """
        start = 0
        for path, column, count in self.parts:
            if _slice(rows, start, start + count) != slice(0, 0):
                yield from self._of_file(path, column, start, rows, shape)
            start += count

    def _of_file(
        self, path: Path, column: str, start: int, rows: np.ndarray, shape: tuple[int, ...] | None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        file, first = self._open(path), start
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if _slice(rows, first, first + count) != slice(0, 0):
                position = first
                for batch in file.iter_batches(DECODE_BATCH, row_groups=[group], columns=[column]):
                    part = _slice(rows, position, position + len(batch))
                    wanted = rows[part] - position
                    images = batch.column(0).take(pa.array(wanted)).to_pylist()
                    numbers = (wanted + position - start).tolist()
                    decoded = []
                    for image, number in zip(images, numbers, strict=True):
                        decoded.append(_decode(image, path, number, shape, self.size))
                    if decoded:
                        yield part, np.stack(decoded)
                    position += len(batch)
            first += count

    def _open(self, path: Path) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"data.{self.split}: {path} cannot be read as Parquet ({error})") from None


def _slice(rows: np.ndarray, start: int, stop: int) -> slice:
    """Which of the ascending ``rows`` lie between; ``slice(0, 0)`` if none."""
    low, high = np.searchsorted(rows, [start, stop]).tolist()
    return slice(low, high) if low < high else slice(0, 0)


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
    image: dict[str, bytes] | None, file: Path, row: int, shape: tuple[int, ...] | None, size: int | None
) -> np.ndarray:
    """[channels, height, width], of ``shape`` if one is due; palettes and transparency become colour."""
    try:
        picture: Image.Image = Image.open(io.BytesIO((image or {})["bytes"]))
        grey = picture.mode in ("L", "1") if shape is None else shape[0] == 1
        picture = picture.convert("L" if grey else "RGB")
        if size is not None and picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    except (Image.DecompressionBombError, OSError, SyntaxError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"data: {file} row {row}: the image does not decode ({type(error).__name__})") from None
    pixels = np.asarray(picture)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if shape is not None and pixels.shape != shape:
        raise InputError(
            f"data.image_size: {file} row {row} is {pixels.shape[2]} x {pixels.shape[1]} pixels, the image of the "
            f"lowest id {shape[2]} x {shape[1]}; set data.image_size to bring all to one size"
        )
    return pixels

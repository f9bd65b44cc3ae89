"""Parquet files in Hugging Face's image layout: a struct column of encoded bytes and a path, and an integer label."""

import functools
import glob
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from fishermask.config import DataConfig
from fishermask.errors import InputError
from fishermask.guard import guarded, short
from fishermask.paths import require_file

MAX_CLASSES = 100_000
"""Where a file names no classes, a larger label is taken for something else than a class."""
DECODE_BATCH = 256
"""Images decoded at once."""
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
"""Formats of images. Others that PIL knows are vector graphics or, as PostScript, programs."""
ENTRY_BATCH = 8192
"""Labels and paths read at once."""


def files(source: str, split: str) -> list[Path]:
    """The files that ``source`` (a file, a folder of ``*.parquet``, or a glob) stands for, sorted.

    Raises:
        InputError: there are none, or there is no such folder.
    """
    path = Path(source).expanduser()
    if path.exists() and not path.is_dir():  # its name may hold [ or *
        return [path]
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
            if repeated := [name for name in names if names.count(name) > 1]:
                raise InputError(f"data.{split}: {path} names the class {short(repeated[0])} twice")
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
            with self._reading(path):
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
                with self._reading(path):
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
                        with guarded(f"data.{self.split}", f"{path} row {number}: the image does not decode"):
                            decoded.append(_decode(image, f"{path} row {number}", shape, self.size))
                    if decoded:
                        yield part, np.stack(decoded)
                    position += len(batch)
            first += count

    def _open(self, path: Path) -> pq.ParquetFile:
        require_file(path, f"data.{self.split}")
        with self._reading(path):
            return pq.ParquetFile(path, page_checksum_verification=True)

    def _reading(self, path: Path) -> AbstractContextManager[None]:
        return guarded(f"data.{self.split}", f"{path} cannot be read as Parquet", passing=(GeneratorExit,))


def _slice(rows: np.ndarray, start: int, stop: int) -> slice:
    """Which of the ascending ``rows`` lie between; ``slice(0, 0)`` if none."""
    low, high = np.searchsorted(rows, [start, stop]).tolist()
    return slice(low, high) if low < high else slice(0, 0)


def _image_column(schema: pa.Schema, file: Path, config: DataConfig) -> str:
    structs = [field.name for field in schema if _holds_images(field.type)]
    wanted = config.image_column or (structs[0] if len(set(structs)) == 1 else None)
    for setting, name in (("image_column", wanted), ("label_column", config.label_column)):
        if (count := schema.names.count(name)) > 1:
            raise InputError(f"data.{setting}: {file} has {count} columns {name!r}; give each column a name of its own")
    if wanted not in structs:
        raise InputError(
            f"data.image_column: {file} has {f'no image column {wanted!r}' if wanted else 'no single image column'}; "
            f"columns of struct<bytes: binary, path: string> there: {', '.join(structs) or 'none'}"
        )
    if config.label_column not in schema.names or not pa.types.is_integer(schema.field(config.label_column).type):
        integers = [field.name for field in schema if pa.types.is_integer(field.type)]
        raise InputError(
            f"data.label_column: {file} has no integer column {config.label_column!r}; "
            f"integer columns there: {', '.join(integers) or 'none'}"
        )
    return str(wanted)


def _holds_images(kind: pa.DataType) -> bool:
    """Whether a column holds encoded images with their paths; a column of paths that are all missing has no type."""
    if not pa.types.is_struct(kind):
        return False
    names = [child.name for child in kind]
    if names.count("bytes") != 1 or names.count("path") != 1:
        return False
    content, path = kind.field("bytes").type, kind.field("path").type
    is_text = pa.types.is_string(path) or pa.types.is_large_string(path) or pa.types.is_null(path)
    return is_text and (pa.types.is_binary(content) or pa.types.is_large_binary(content))


def _class_names(schema: pa.Schema, label_column: str) -> list[str]:
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(text)["info"]["features"][label_column]["names"] if text else []
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return []  # The note is optional and other tools write it: classes then go by number.
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _decode(image: dict[str, bytes] | None, place: str, shape: tuple[int, ...] | None, size: int | None) -> np.ndarray:
    """[channels, height, width], of ``shape`` if one is due; palettes and transparency become color.

    Raises:
        InputError: it is of another size, or of a type whose range is not known.
        Exception: what PIL raises for bytes that are no image.
    """
    content = (image or {}).get("bytes")
    if content is None:
        raise ValueError("it has no bytes")
    with Image.open(io.BytesIO(content), formats=_formats()) as opened:
        picture = _eight_bits(ImageOps.exif_transpose(opened), opened.format)
    gray = picture.mode in ("L", "1") if shape is None else shape[0] == 1
    picture = picture.convert("L" if gray else "RGB")
    if size is not None and picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if shape is not None and pixels.shape != shape:
        raise InputError(
            f"data.image_size: {place} is {pixels.shape[2]} x {pixels.shape[1]} pixels, the image of the "
            f"lowest id {shape[2]} x {shape[1]}; set data.image_size to bring all to one size"
        )
    return pixels


@functools.cache
def _formats() -> list[str]:
    """Return those of ``FORMATS`` that this version of PIL reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _eight_bits(picture: Image.Image, image_format: str | None) -> Image.Image:
    """Return a picture of 16 bits with 8, each value scaled to the nearest; PIL would clip it to white.

    Raises:
        ValueError: pixels are 32-bit numbers, whose range no file says.
    """
    # Older versions of PIL open a PNG of 16 bits in mode I.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and image_format == "PNG"):
        values = np.asarray(picture).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers, PIL's mode {picture.mode}; save it with 8 or 16 bits")
    return picture

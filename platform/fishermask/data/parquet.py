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
from fishermask.data.decoding import is_gray, picture_to_pixels
from fishermask.errors import InputError
from fishermask.guard import guarded, one_line, short
from fishermask.paths import require_file
from fishermask.tensors.images import Statistics

MAX_CLASSES = 100_000
"""Labels in files without class names must be below this number, so that other integers are not taken for labels."""
DECODE_BATCH = 256
"""Images decoded per batch."""
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
"""Raster image formats. Other formats that PIL reads are vector graphics or programs, such as PostScript."""
LABEL_BATCH = 8192
"""Labels and paths read per batch."""


class ParquetSource:
    """A data set in the Parquet files of ``data.train`` and ``data.test``, or of one ``folder``.

    Args:
        summary: one line for the list of data sets.
        folder: holds ``train.parquet`` and ``test.parquet``; None to use the settings.
        statistics: channel statistics from the literature.
    """

    downloads = False

    def __init__(self, summary: str, folder: Path | None = None, statistics: Statistics | None = None) -> None:
        self.summary, self.folder, self.statistics = summary, folder, statistics
        self.settings = ("train", "test") if folder is None else ()
        self.fields = (*self.settings, "image_column", "label_column") if folder is None else ()

    def path_setting(self, split: str) -> str:
        """Return the dotted path of the setting that locates the files of ``split``."""
        return f"data.{split}" if self.folder is None else "data.name"

    def find_files(self, config: DataConfig, split: str) -> list[Path]:
        """Return the files of ``split``, sorted; the setting is a file, a folder of ``*.parquet``, or a glob.

        Raises:
            InputError: the setting is missing, no file matches it, or a test file is a training file too.
        """
        if self.folder is not None:
            return [self.folder / f"{split}.parquet"]
        setting = getattr(config, split)
        if setting is None:
            raise InputError(f"data.{split}: missing; give the Parquet file, folder or glob of the {split} images")
        paths = self._match_files(setting, split)
        if split == "test":
            training = {path.resolve() for path in self.find_files(config, "train")}
            if shared := [path for path in paths if path.resolve() in training]:
                raise InputError(f"data.test: {shared[0]} is also a training file; give other images")
        return paths

    def _match_files(self, setting: str, split: str) -> list[Path]:
        path = Path(setting).expanduser()
        if path.exists() and not path.is_dir():  # its name may contain [ or *
            return [path]
        # Path.glob does not accept absolute patterns.
        paths = sorted(path.glob("*.parquet")) if path.is_dir() else [Path(f) for f in sorted(glob.glob(str(path)))]  # noqa: PTH207
        if not paths:
            hint = "" if path.is_absolute() else "; relative paths start in the working folder"
            raise InputError(f"data.{split}: no Parquet file at {path.absolute()}{hint}")
        return paths

    def open_split(self, config: DataConfig, split: str, paths: Sequence[Path]) -> "ParquetReader":
        """Open the files ``paths`` of ``split``.

        Raises:
            InputError: see ``ParquetReader``.
        """
        return ParquetReader(paths, split, config)


class ParquetReader:
    """The images of a split in one or more Parquet files.

    Raises:
        InputError: the files hold no images, are not Parquet, lack a column, or name different classes.
    """

    def __init__(self, paths: Sequence[Path], split: str, config: DataConfig) -> None:
        self.split, self.config = split, config
        self.classes: list[str] = []
        self.files: list[tuple[Path, str, int]] = []
        """Path, image column and number of rows of each file."""
        for path in paths:
            file = self._open(path)
            column = _image_column(file.schema_arrow, path, config)
            names = _class_names(file.schema_arrow, config.label_column)
            if self.classes and names and names != self.classes:
                raise InputError(f"data.{split}: {path} and an earlier file name different classes")
            if repeated := [name for name in names if names.count(name) > 1]:
                raise InputError(f"data.{split}: {path} names the class {short(repeated[0])} twice")
            self.classes = self.classes or names
            self.files.append((path, column, file.metadata.num_rows))
        self.count = sum(rows for _, _, rows in self.files)
        if not self.count:
            raise InputError(f"data.{split}: {', '.join(str(path) for path in paths)} holds no images")

    def labels_and_paths(self) -> Iterator[tuple[list[int], list[str | None]]]:
        """Yield the labels and paths of all rows in batches, without reading the bytes of the images.

        Raises:
            InputError: a label is missing or out of range; the message names its file and row.
        """
        limit = (len(self.classes) or MAX_CLASSES) - 1
        label_column = self.config.label_column
        for path, column, _ in self.files:
            row = 0
            with self._reading(path):
                batches = self._open(path).iter_batches(LABEL_BATCH, columns=[f"{column}.path", label_column])
                for batch in batches:
                    labels = batch.column(label_column).to_pylist()
                    for label in labels:
                        if not isinstance(label, int) or not 0 <= label <= limit:
                            value = "null; give the row a label, or remove it" if label is None else label
                            raise InputError(
                                f"data.{self.split}: {path} row {row}: label must be 0 to {limit}, got {value}"
                            )
                        row += 1
                    yield labels, [(image or {}).get("path") for image in batch.column(column).to_pylist()]

    def pixels(self, rows: np.ndarray, shape: tuple[int, ...] | None) -> Iterator[tuple[slice, np.ndarray]]:
        """Decode the ascending ``rows`` in batches; read only the row groups that hold them.

        Raises:
            InputError: an image does not decode or is not of ``shape``; the message names its file and row.
        """
        start = 0
        for path, column, count in self.files:
            if _rows_between(rows, start, start + count) != EMPTY:
                with self._reading(path):
                    yield from self._file_pixels(path, column, start, rows, shape)
            start += count

    def _file_pixels(
        self, path: Path, column: str, start: int, rows: np.ndarray, shape: tuple[int, ...] | None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the same as ``pixels`` for the file at ``path``, whose first row is ``start``."""
        file, group_start = self._open(path), start
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if _rows_between(rows, group_start, group_start + count) != EMPTY:
                batch_start = group_start
                for batch in file.iter_batches(DECODE_BATCH, row_groups=[group], columns=[column]):
                    part = _rows_between(rows, batch_start, batch_start + len(batch))
                    images = batch.column(0).take(pa.array(rows[part] - batch_start)).to_pylist()
                    decoded = []
                    for image, row in zip(images, (rows[part] - start).tolist(), strict=True):
                        with guarded(f"data.{self.split}", f"{path} row {row}: the image does not decode"):
                            decoded.append(_decode_image(image, f"{path} row {row}", shape, self.config))
                    if decoded:
                        yield part, np.stack(decoded)
                    batch_start += len(batch)
            group_start += count

    def _open(self, path: Path) -> pq.ParquetFile:
        require_file(path, f"data.{self.split}")
        with self._reading(path):
            return pq.ParquetFile(path, page_checksum_verification=True)

    def _reading(self, path: Path) -> AbstractContextManager[None]:
        return guarded(f"data.{self.split}", f"{path} cannot be read as Parquet", passing=(GeneratorExit,))


EMPTY = slice(0, 0)


def _rows_between(rows: np.ndarray, start: int, stop: int) -> slice:
    """Return the slice of the ascending ``rows`` with values from ``start`` to below ``stop``; ``EMPTY`` if none."""
    low, high = np.searchsorted(rows, [start, stop]).tolist()
    return slice(low, high) if low < high else EMPTY


def _image_column(schema: pa.Schema, file: Path, config: DataConfig) -> str:
    structs = [field.name for field in schema if _holds_images(field.type)]
    image_column = config.image_column or (structs[0] if len(set(structs)) == 1 else None)
    for setting, name in (("image_column", image_column), ("label_column", config.label_column)):
        if (count := schema.names.count(name)) > 1:
            raise InputError(f"data.{setting}: {file} has {count} columns {name!r}; give each column a unique name")
    if image_column not in structs:
        problem = f"no image column {image_column!r}" if image_column else "no single image column"
        raise InputError(
            f"data.image_column: {file} has {problem}; "
            f"columns of struct<bytes: binary, path: string>: {', '.join(structs) or 'none'}"
        )
    integers = [field.name for field in schema if pa.types.is_integer(field.type)]
    if config.label_column not in schema.names:
        raise InputError(
            f"data.label_column: {file} has no integer column {config.label_column!r}; "
            f"integer columns: {', '.join(integers) or 'none'}"
        )
    if config.label_column not in integers:
        other = f", or choose an integer column: {', '.join(integers)}" if integers else ""
        raise InputError(
            f"data.label_column: column {config.label_column!r} of {file} is "
            f"{one_line(str(schema.field(config.label_column).type), 60)}; convert it to integers 0, 1, 2, ...{other}"
        )
    return str(image_column)


def _holds_images(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds encoded images with paths."""
    if not pa.types.is_struct(kind):
        return False
    names = [child.name for child in kind]
    if names.count("bytes") != 1 or names.count("path") != 1:
        return False
    content, path = kind.field("bytes").type, kind.field("path").type
    # A column without a single path has the type null.
    is_text = pa.types.is_string(path) or pa.types.is_large_string(path) or pa.types.is_null(path)
    return is_text and (pa.types.is_binary(content) or pa.types.is_large_binary(content))


def _class_names(schema: pa.Schema, label_column: str) -> list[str]:
    """Return the class names from Hugging Face's metadata; empty if there are none."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(text)["info"]["features"][label_column]["names"] if text else []
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return []  # The metadata is optional, and other tools write it: classes are then named by number.
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _decode_image(
    image: dict[str, bytes] | None, place: str, shape: tuple[int, ...] | None, config: DataConfig
) -> np.ndarray:
    """Return the pixels, uint8 [channels, height, width], of ``shape`` unless that is None.

    Raises:
        InputError: the image has another size.
        Exception: whatever PIL raises for bytes that are not an image.
    """
    content = (image or {}).get("bytes")
    if content is None:
        raise ValueError("it has no bytes")
    with Image.open(io.BytesIO(content), formats=_readable_formats()) as opened:
        picture = _convert_to_8_bits(ImageOps.exif_transpose(opened), opened.format)
    gray = is_gray(config, picture.mode in ("L", "1")) if shape is None else shape[0] == 1
    pixels = picture_to_pixels(picture, gray, config.image_size)
    if shape is not None and pixels.shape != shape:
        raise InputError(
            f"data.image_size: {place} is {pixels.shape[2]} x {pixels.shape[1]} pixels, but the image with the lowest "
            f"id is {shape[2]} x {shape[1]}; set data.image_size to resize all images"
        )
    return pixels


@functools.cache
def _readable_formats() -> list[str]:
    """Return the members of ``FORMATS`` that the installed version of PIL can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _convert_to_8_bits(picture: Image.Image, image_format: str | None) -> Image.Image:
    """Return a picture with 16 bits per channel scaled to 8 bits; PIL would clip its values to white.

    Raises:
        ValueError: the pixels are 32-bit numbers, whose range the file does not state.
    """
    # Older versions of PIL open a 16-bit PNG in mode I.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and image_format == "PNG"):
        values = np.asarray(picture).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers, PIL's mode {picture.mode}; save it with 8 or 16 bits")
    return picture

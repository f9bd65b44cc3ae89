"""The registry of data sets: name -> source, an object that finds and reads the files of the data set.

To add a source, write a class that satisfies ``Source`` in a file of its own, and add an instance to ``SOURCES``.
"""

import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from fishermask.config import DataConfig
from fishermask.data.parquet import ParquetSource
from fishermask.data.torchvision_sets import TORCHVISION_SETS, TorchvisionSource
from fishermask.errors import InputError
from fishermask.guard import short
from fishermask.tensors.images import Statistics

BUNDLED = "fashion_mnist_small"
"""The data set that ships with the package."""
SPLITS = ("train", "test")


class SplitReader(Protocol):
    """One split of a data set, opened for reading. Its rows are numbered over all its files."""

    count: int
    classes: list[str]
    """Names of the first classes; a source may name fewer classes than its labels have."""

    def labels_and_paths(self) -> Iterator[tuple[list[int], list[str | None]]]:
        """Yield the labels and paths of all rows in batches, without decoding an image."""

    def pixels(self, rows: np.ndarray, shape: tuple[int, ...] | None) -> Iterator[tuple[slice, np.ndarray]]:
        """Decode the ascending ``rows`` in batches; yield a slice of ``rows`` and uint8 [b, channels, height, width].

        Args:
            shape: channels, height and width that every image must have; None for those of the first image.
        """


class Source(Protocol):
    """A data set, or a kind of data sets, that ``data.name`` selects."""

    @property
    def summary(self) -> str:
        """One line for the list of data sets."""

    @property
    def settings(self) -> tuple[str, ...]:
        """Fields of ``DataConfig`` that the source requires."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of ``DataConfig`` that only some sources use, this one among them; other sources refuse them."""

    @property
    def downloads(self) -> bool:
        """Whether ``data.download`` fetches missing files."""

    @property
    def statistics(self) -> Statistics | None:
        """Channel statistics from the literature, of the images as stored; None if there are none."""

    def path_setting(self, split: str) -> str:
        """Return the dotted path of the setting that locates the files of ``split``."""

    def find_files(self, config: DataConfig, split: str) -> list[Path]:
        """Return the files that determine the content of ``split``; none if they are not downloaded yet.

        Raises:
            InputError: a setting is missing, or no file matches it.
        """

    def open_split(self, config: DataConfig, split: str, paths: Sequence[Path]) -> SplitReader:
        """Open the files ``paths`` of ``split``; download them if they are missing and ``data.download`` is set.

        Raises:
            InputError: the files cannot be read.
        """


SOURCES: dict[str, Source] = {
    BUNDLED: ParquetSource(
        "1,000 training and 200 test images of each Fashion-MNIST class, 1 x 28 x 28; shipped with the package",
        folder=Path(__file__).parent / "fashion_mnist",
        statistics=TORCHVISION_SETS["FashionMNIST"].statistics,
    ),
    **{name: TorchvisionSource(name) for name in TORCHVISION_SETS},
    "parquet": ParquetSource("your images, in Parquet files in Hugging Face's image layout"),
}


class DatasetInfo(NamedTuple):
    """Description of a data set for users."""

    name: str
    """Value of ``data.name``."""
    summary: str
    """Description in one line."""
    settings: tuple[str, ...]
    """Required settings: ``data.root`` and the like."""
    downloads: bool
    """Whether ``data.download: true`` fetches the data set."""


def list_datasets() -> list[DatasetInfo]:
    """Return every data set with its required settings, in the order of the registry."""
    return [
        DatasetInfo(name, source.summary, tuple(f"data.{field}" for field in source.settings), source.downloads)
        for name, source in SOURCES.items()
    ]


def find_source(config: DataConfig) -> Source:
    """Return the source that ``data.name`` selects.

    Raises:
        InputError: no source has this name, or the source does not use a field that is set.
    """
    if config.name not in SOURCES:
        raise InputError(f"data.name: unknown data set {short(config.name)}; available: {', '.join(SOURCES)}")
    source = SOURCES[config.name]
    for field in (field for other in SOURCES.values() for field in other.fields if field not in source.fields):
        if getattr(config, field) != DataConfig.model_fields[field].default:
            names = [name for name, other in SOURCES.items() if field in other.fields]
            raise InputError(
                f"data.{field}: not used by {config.name}; set data.name to {', '.join(names)}, or remove it"
            )
    return source


def reopen_split(config: DataConfig, split: str, recorded: Sequence[tuple[str, int]]) -> SplitReader:
    """Open a split again, possibly on another machine, and check its files against the ``recorded`` paths and sizes.

    Raises:
        InputError: a file is missing or has another size.
    """
    source = find_source(config)
    if source.downloads:
        return source.open_split(config, split, [])
    # Another machine may have the package, and so the bundled data set, in another folder.
    paths = source.find_files(config, split) if config.name == BUNDLED else [Path(path) for path, _ in recorded]
    for path, (_, size) in zip(paths, recorded, strict=True):
        host = socket.gethostname()
        if not path.is_file():
            raise InputError(
                f"data.{split}: {path} is not on {host}, which has no decoded copy of it either; "
                "copy the file to every machine"
            )
        if path.stat().st_size != size:
            raise InputError(
                f"data.{split}: {path} on {host} differs from the file on the machine where the run began; "
                "copy the same files to every machine"
            )
    return source.open_split(config, split, paths)


def make_absolute(config: DataConfig) -> DataConfig:
    """Return ``config`` with absolute paths, which stay valid in another working folder."""
    paths = {field: getattr(config, field) for field in ("root", "train", "test")}
    return config.model_copy(
        update={field: str(Path(path).expanduser().absolute()) for field, path in paths.items() if path is not None}
    )


def needs_download(config: DataConfig) -> bool:
    """Return whether ``data.download`` is set and the data set cannot be read without it. Downloads nothing.

    Raises:
        InputError: no such data set, or ``data.root`` is missing.
    """
    source = find_source(config)
    if not (config.download and source.downloads):
        return False
    offline = config.model_copy(update={"download": False})
    paths = {split: source.find_files(offline, split) for split in SPLITS}
    try:
        for split in SPLITS:
            source.open_split(offline, split, paths[split])
    except InputError:
        return True
    return False

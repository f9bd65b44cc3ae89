"""Where images come from before they are decoded: the one place that knows every kind of source."""

import socket
from collections.abc import Iterator, Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Protocol

import numpy as np

from fishermask.config import DataConfig
from fishermask.data import parquet, torchvision_sets
from fishermask.errors import InputError
from fishermask.guard import short
from fishermask.tensors.images import Statistics

EMBEDDED = "fashion_mnist_small"
PARQUET = "parquet"
SPLITS = ("train", "test")


class Source(Protocol):
    """One split where it came from; its rows are numbered over all its files."""

    count: int
    classes: list[str]
    """Names that the source gives; may be fewer than its labels."""

    def entries(self) -> Iterator[tuple[list[int], list[str | None]]]:
        """Labels and paths of all rows, batch after batch, without decoding an image."""

    def pixels(self, rows: np.ndarray, shape: tuple[int, ...] | None) -> Iterator[tuple[slice, np.ndarray]]:
        """Decode the ascending ``rows``, batch after batch: which of ``rows``, and uint8 [b, channels, height, width].

        Args:
            shape: channels, height and width that images must have; None takes what the first has.
        """


def available() -> list[str]:
    """Names of the data sets."""
    return [EMBEDDED, *torchvision_sets.SETS, PARQUET]


def files(config: DataConfig, split: str) -> list[Path]:
    """The files that decide what a split holds; none for a torchvision set that is still to be fetched.

    Raises:
        InputError: unknown data set, a setting that is missing, or nothing there.
    """
    if config.name == EMBEDDED:
        return [Path(str(resources("fishermask.data") / "fashion_mnist" / f"{split}.parquet"))]
    if config.name == PARQUET:
        if getattr(config, split) is None:
            raise InputError(f"data.{split}: missing; give the Parquet file, folder or glob of the {split} images")
        return parquet.files(getattr(config, split), split)
    if config.name in torchvision_sets.SETS:
        return torchvision_sets.files(config)
    raise InputError(f"data.name: unknown data set {short(config.name)}; there are {', '.join(available())}")


def setting(config: DataConfig, split: str) -> str:
    """Return the setting that says where the files of a split are."""
    return {PARQUET: f"data.{split}", EMBEDDED: "data.name"}.get(config.name, "data.root")


def open_split(config: DataConfig, split: str, paths: Sequence[Path] | None = None) -> Source:
    """Open a split, from other ``paths`` than those that ``files`` finds where they are given.

    Raises:
        InputError: it cannot be read.
    """
    if config.name in torchvision_sets.SETS:
        return torchvision_sets.TorchvisionSource(config, split)
    return parquet.ParquetSource(files(config, split) if paths is None else paths, split, config)


def reopen(config: DataConfig, split: str, recorded: Sequence[tuple[str, int]]) -> Source:
    """Open a split that was seen before, with these files and sizes, perhaps on another machine.

    Raises:
        InputError: a file is gone, or is not the one it was.
    """
    if config.name in torchvision_sets.SETS:
        return open_split(config, split)
    # The package may be installed elsewhere on another machine.
    paths = files(config, split) if config.name == EMBEDDED else [Path(path) for path, _ in recorded]
    for path, (_, size) in zip(paths, recorded, strict=True):
        if not path.is_file():
            raise InputError(
                f"data.{split}: {path} is not on {socket.gethostname()}, which has no decoded copy of it either; "
                "bring the file to every machine"
            )
        if path.stat().st_size != size:
            raise InputError(f"data.{split}: {path} on {socket.gethostname()} is not the file that the run began with")
    return open_split(config, split, paths)


def absolute(config: DataConfig) -> DataConfig:
    """``config`` with paths that mean the same in another working folder."""
    paths = {field: getattr(config, field) for field in ("root", "train", "test")}
    return config.model_copy(
        update={field: str(Path(path).expanduser().absolute()) for field, path in paths.items() if path is not None}
    )


def published(config: DataConfig) -> Statistics | None:
    """Channel statistics from the literature, where there are any."""
    name = "FashionMNIST" if config.name == EMBEDDED else config.name
    return torchvision_sets.SETS[name].statistics if name in torchvision_sets.SETS else None

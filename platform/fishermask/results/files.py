"""The folder of one sweep and the folders of its runs. Every file can be read while a sweep writes it.

results/<sweep>/config.yaml                   the sweep with all overrides
results/<sweep>/pools/<hash>.csv              id and class of each image of a pool; runs of one pool share it
results/<sweep>/runs/<run>/config.yaml        settings of the run, defaults included
results/<sweep>/runs/<run>/provenance.json    pool, identities and environments of the run
results/<sweep>/runs/<run>/rounds.jsonl       one line per round
results/<sweep>/runs/<run>/journal.jsonl      picks of the round in progress
results/<sweep>/runs/<run>/error.txt          traceback of the last attempt, if it failed
"""

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from fishermask.config import ExperimentConfig, hash_json, parse
from fishermask.errors import InputError
from fishermask.guard import one_line
from fishermask.paths import require_file
from fishermask.results.provenance import Provenance
from fishermask.yaml_files import read_yaml

ROUND_KEYS = {"round", "labels", "accuracy", "balanced_accuracy", "macro_f1", "recall", "batch", "batch_classes"}
ROUND_KEYS |= {"seconds", "ended_by", "epochs", "train_accuracy"}
ROUND_NUMBERS = ("round", "labels", "accuracy", "balanced_accuracy", "macro_f1", "epochs", "train_accuracy")
ROUND_TABLES = ("recall", "batch_classes", "seconds")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a sweep's folder, so that no other process writes to it. The end of the process releases it.

    Raises:
        InputError: another process holds the lock.
    """
    path = folder / ".lock"
    if path.exists():
        require_file(path, "output")
    lock = FileLock(path)
    with writing(path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"name: another process is writing to {folder}; wait until it ends, or choose another name=NAME"
            ) from None
    try:
        yield
    finally:
        lock.release()


def check_unlocked(folder: Path) -> None:
    """Raise ``InputError`` if another process holds the lock of a sweep's folder."""
    if (folder / ".lock").exists():
        with locked(folder):
            pass


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert a disk error in the block to an ``InputError``.

    Raises:
        InputError: the disk is full, the folder cannot be written to, or a folder has the file's name.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"output: cannot write {path} ({error.strerror}); free disk space, or choose another folder with output=DIR"
        ) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write to a temporary file and rename it, so that a reader sees the old content or the new content.

    Raises:
        InputError: the file cannot be written.
    """
    partial = _partial(path)
    with writing(path):
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file without an incomplete last line, which a killed process may leave.

    Raises:
        InputError: the file is not a regular file, or cannot be read.
        UnicodeDecodeError: the content is not UTF-8.
    """
    require_file(path)
    try:
        return path.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def append_line(path: Path, content: Any) -> None:
    """Append a line of JSON and flush it to disk. An incomplete last line is overwritten.

    NaN and infinity, which JSON does not have, become null.

    Raises:
        InputError: the file cannot be written.
    """
    line = json.dumps(_plain(content), allow_nan=False).encode() + b"\n"
    with writing(path), path.open("r+b" if path.exists() else "w+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _plain(value: Any) -> Any:
    """Return ``value`` with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_folder(path: Path) -> None:
    """Create a folder, and check that files can be written to it.

    Raises:
        InputError: the folder cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"output: cannot write to {path} ({error.strerror}); choose another with output=DIR") from None


class _HashWriter:
    """A text file that keeps only the hash of its content."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def write(self, text: str) -> None:
        self.hash.update(text.encode())


def _write_images(file: Any, images: Iterable[tuple[str, str]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["id", "class"])
    writer.writerows(images)


def pool_name(images: Iterable[tuple[str, str]]) -> str:
    """Return the name of the file of a pool, a hash of its content, without writing it."""
    writer = _HashWriter()
    _write_images(writer, images)
    return f"{writer.hash.hexdigest()[:16]}.csv"


def write_pool(sweep: Path, images: Iterable[tuple[str, str]]) -> str:
    """Write the id and class of each image of a pool to the sweep's folder ``pools``; return the file's name.

    The name is a hash of the content: equal pools share a file.

    Raises:
        InputError: the file cannot be written.
    """
    folder = sweep / "pools"
    make_folder(folder)
    partial = _partial(folder / "pool.csv")
    with writing(partial):
        try:
            with partial.open("w", encoding="utf-8", newline="") as table:
                _write_images(table, images)
            with partial.open("rb") as content:
                path = folder / f"{hashlib.file_digest(content, 'sha256').hexdigest()[:16]}.csv"
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path.name


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rounds = path / "rounds.jsonl"
        self.error = path / "error.txt"
        self.journal = JournalFile(path / "journal.jsonl")

    def config(self) -> ExperimentConfig | None:
        """Return the settings of the folder's run; None if the folder holds no run yet."""
        path = self.path / "config.yaml"
        return parse(ExperimentConfig, read_yaml(path), f"{path}:") if path.exists() else None

    def provenance(self) -> Provenance:
        """Return the pool, identities and environments of the run; empty if none are recorded.

        Raises:
            InputError: the file is damaged.
        """
        path = self.path / "provenance.json"
        if not os.path.lexists(path):
            return Provenance()
        require_file(path)
        try:
            return Provenance.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise InputError(f"{path}: is damaged ({one_line(str(error))}); move the run's folder away") from None

    def check_pool(self, pool: str) -> None:
        """Raise ``InputError`` if the rounds in the folder were computed with another pool than ``pool``."""
        recorded = self.provenance().pool
        if recorded not in ("", pool) and self.rounds.exists():
            raise InputError(
                f"data: the pool differs from pools/{recorded}, with which {self.path} was begun; restore the data, or "
                "choose another name=NAME"
            )

    def create(self, config: ExperimentConfig, identity: dict[str, Any], pool: str) -> None:
        """Create the folder of a run, or prepare it for more rounds of the run that it holds.

        Args:
            identity: the identity under which the next rounds are computed.
            pool: the name that ``write_pool`` returned.

        Raises:
            InputError: the rounds in the folder were computed with another pool.
        """
        self.check_pool(pool)
        make_folder(self.path)
        provenance = self.provenance()
        if provenance.identity != identity:
            self.journal.path.unlink(missing_ok=True)  # its picks belong to another identity
        if not self.rounds.exists():
            provenance = Provenance()
        provenance = replace(provenance.with_identity(identity), pool=pool)
        write_atomically(self.path / "provenance.json", provenance.to_json())
        write_atomically(self.path / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))

    def history(self) -> list[dict[str, Any]]:
        """Return the records of the finished rounds.

        Raises:
            InputError: the file is damaged.
        """
        if not self.rounds.exists() and not self.rounds.is_symlink():
            return []
        try:
            rounds = [json.loads(line) for line in read_lines(self.rounds)]
            if all(_is_round(value, index) for index, value in enumerate(rounds)):
                return rounds
        except InputError:
            raise
        except (ValueError, RecursionError):
            pass  # neither JSON nor UTF-8, or nested too deeply
        raise InputError(f"{self.rounds}: is damaged, its lines are not rounds 0, 1, 2, ...; remove it to run again")

    def append(self, result: dict[str, Any]) -> None:
        """Append a round and flush it to disk; remove the journal of its picks.

        The ``environment`` of the round is written to ``provenance.json``, and the round contains its hash.
        """
        environment = result.get("environment")
        if isinstance(environment, dict):
            result = result | {"environment": hash_json(environment)}
            provenance = self.provenance()
            if result["environment"] not in provenance.environments:
                content = provenance.with_environment(environment).to_json()
                write_atomically(self.path / "provenance.json", content)
        append_line(self.rounds, result)
        self.journal.path.unlink(missing_ok=True)
        self.error.unlink(missing_ok=True)


class JournalFile:
    """The picks of a run's round in progress, one line per ``append``.

    Entries are numbered. If a process that was considered lost writes late, no entry is shifted or repeated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._next = ("", 0)  # the query that was read last, and the number of its next entry

    def read(self, query: str) -> list[list[Any]]:
        """Return the entries of ``query``. Ignore the entries of other queries and an incomplete last line.

        Raises:
            InputError: the file is damaged.
        """
        entries: list[list[Any]] = []
        try:
            lines = read_lines(self.path) if self.path.exists() else []
            for line in map(json.loads, lines):
                first, picks = line["first"], line["picks"]
                if line["query"] == query and first <= len(entries):
                    entries[first : first + len(picks)] = picks
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{self.path}: is damaged; remove it to compute the round's picks again") from None
        self._next = (query, len(entries))
        return entries

    def append(self, query: str, entries: list[list[Any]], first: int | None = None) -> None:
        """Append entries to ``query``, from entry number ``first`` on; by default, after the last known entry."""
        if first is None:
            if self._next[0] != query:
                self.read(query)
            first = self._next[1]
        append_line(self.path, {"query": query, "first": first, "picks": entries})
        self._next = (query, first + len(entries))


def _is_round(value: Any, index: int) -> bool:
    """Return whether ``value`` is a valid record of round ``index``."""
    if not isinstance(value, dict) or not value.keys() >= ROUND_KEYS or value["round"] != index:
        return False
    if not _is_number(value["labels"]) or not all(_is_number_or_null(value[key]) for key in ROUND_NUMBERS):
        return False
    tables = [value[key] for key in ROUND_TABLES]
    if not all(isinstance(table, dict) and all(map(_is_number_or_null, table.values())) for table in tables):
        return False
    if not all(isinstance(value.get(key, ""), str) for key in ("identity", "environment")):
        return False
    lists = value["batch"], value.get("initial", [])
    return all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_number_or_null(value: Any) -> bool:
    return value is None or _is_number(value)


def run_folders(sweep: Path) -> list[RunFolder]:
    """Return the run folders of a sweep, sorted by name."""
    return [RunFolder(path.parent) for path in sorted((sweep / "runs").glob("*/config.yaml"))]

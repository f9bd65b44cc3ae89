"""The folder of one sweep, and in it the folder of each run. Any of it can be read while a sweep writes.

results/<sweep>/config.yaml               the sweep as resolved
results/<sweep>/runs/<run>/config.yaml    the run's settings, defaults included
results/<sweep>/runs/<run>/pool.csv       id, class, and whether it was labeled at the start
results/<sweep>/runs/<run>/rounds.jsonl   a line a round
results/<sweep>/runs/<run>/journal.jsonl  picks of the round under way
results/<sweep>/runs/<run>/error.txt      traceback of the last attempt, if it failed
"""

import csv
import fcntl
import filecmp
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from fishermask.config import ExperimentConfig, parse
from fishermask.errors import InputError
from fishermask.paths import require_file
from fishermask.yaml_files import read_yaml

ROUND_KEYS = {"round", "labels", "accuracy", "balanced_accuracy", "macro_f1", "recall", "batch", "batch_classes"}
ROUND_KEYS |= {"seconds", "ended_by", "epochs", "train_accuracy"}
ROUND_NUMBERS = ("round", "labels", "accuracy", "balanced_accuracy", "macro_f1", "epochs", "train_accuracy")
ROUND_TABLES = ("recall", "batch_classes", "seconds")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a sweep's folder, so that no second process writes there; the lock ends with this process at the latest.

    Raises:
        InputError: another process holds it.
    """
    lock = folder / ".lock"
    if lock.exists():
        require_file(lock, "output")  # to open a FIFO would block
    with writing(lock):
        file = lock.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"name: another process is writing to {folder}; wait for it, or choose name=NAME"
            ) from None
        except OSError as error:
            raise InputError(f"output: cannot lock {lock} ({error.strerror}); choose another folder") from None
        yield


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk into one line.

    Raises:
        InputError: the disk is full, the folder cannot be written to, or a folder has the file's name.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"output: cannot write {path} ({error.strerror}); make room, or choose another folder with output=DIR"
        ) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write to a temporary name, then rename: a reader sees the old file or the whole new one.

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
    """Return the whole lines of a text file; what a kill left of a last line is left out.

    Raises:
        InputError: it is no regular file, or cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    require_file(path)
    try:
        return path.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def append_line(path: Path, content: Any) -> None:
    """Add a line of JSON, over what a kill left of a line before it; it is on disk when this returns.

    Raises:
        InputError: the file cannot be written.
    """
    with writing(path), path.open("r+b" if path.exists() else "w+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        file.write(json.dumps(content).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Make a folder that can be written to.

    Raises:
        InputError: it cannot be.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"output: cannot write to {path} ({error.strerror}); choose another with output=DIR") from None


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rounds = path / "rounds.jsonl"
        self.error = path / "error.txt"
        self.journal = JournalFile(path / "journal.jsonl")

    def config(self) -> ExperimentConfig | None:
        """The settings of the run that the folder holds; None if it holds none yet."""
        path = self.path / "config.yaml"
        return parse(ExperimentConfig, read_yaml(path), str(path)) if path.exists() else None

    def create(self, config: ExperimentConfig, pool: Iterable[tuple[str, str, bool]]) -> None:
        """Make the folder of a run with this config and pool (id, class, labeled at the start).

        A run of the same fingerprint may be there already, and is then continued.

        Raises:
            InputError: the run's first rounds were made with other data.
        """
        make_folder(self.path)
        index = self.path / "pool.csv"
        partial = _partial(index)
        with writing(index), ExitStack() as stack:
            stack.callback(partial.unlink, missing_ok=True)
            with partial.open("w", encoding="utf-8", newline="") as table:
                writer = csv.writer(table, lineterminator="\n")
                writer.writerow(["id", "class", "initial"])
                writer.writerows((name, label, int(initial)) for name, label, initial in pool)
            stack.pop_all()
        if self.rounds.exists() and index.exists() and not filecmp.cmp(index, partial, shallow=False):
            partial.unlink()
            raise InputError(
                f"data: its images are not those that {self.path} was begun with; choose another name=NAME"
            )
        with writing(index):
            partial.replace(index)
        settings = config.model_dump()
        write_atomically(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False))

    def history(self) -> list[dict[str, Any]]:
        """The rounds so far. A last line that a kill cut short does not count.

        Raises:
            InputError: a line in the middle is not what we wrote.
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
            pass  # not JSON, not UTF-8, or nested without end: the same to whoever must mend it
        raise InputError(f"{self.rounds}: is damaged, its lines are not rounds 0, 1, 2, ...; remove it to run again")

    def append(self, result: dict[str, Any]) -> None:
        """Add a round; it is on disk when this returns. The journal of its picks has served."""
        append_line(self.rounds, result)
        self.journal.path.unlink(missing_ok=True)
        self.error.unlink(missing_ok=True)


class JournalFile:
    """The picks of one run's round under way, a line for each ``append``.

    Entries are numbered: a writer that was thought dead and comes late can neither shift nor repeat what another wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._next = ("", 0)  # the query that was read last, and the number of its next entry

    def read(self, query: str) -> list[list[Any]]:
        """The entries of ``query``; other queries' and a last line that a kill cut short do not count.

        Raises:
            InputError: a line is not what we wrote.
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
            raise InputError(f"{self.path}: is damaged; remove it, the round's picks are made again") from None
        self._next = (query, len(entries))
        return entries

    def append(self, query: str, entries: list[list[Any]], first: int | None = None) -> None:
        """Add entries to ``query``, behind those read or added last, or as its entries from number ``first`` on."""
        if first is None:
            if self._next[0] != query:
                self.read(query)
            first = self._next[1]
        append_line(self.path, {"query": query, "first": first, "picks": entries})
        self._next = (query, first + len(entries))


def _is_round(value: Any, index: int) -> bool:
    """Whether ``value`` is the record of round ``index``, with numbers where a report computes with them."""
    if not isinstance(value, dict) or not value.keys() >= ROUND_KEYS or value["round"] != index:
        return False
    if not all(_is_number(value[key]) for key in ROUND_NUMBERS):
        return False
    tables = [value[key] for key in ROUND_TABLES]
    if not all(isinstance(table, dict) and all(map(_is_number, table.values())) for table in tables):
        return False
    return isinstance(value["batch"], list) and all(isinstance(name, str) for name in value["batch"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def run_folders(sweep: Path) -> list[RunFolder]:
    """The run folders of a sweep, by name."""
    return [RunFolder(path.parent) for path in sorted((sweep / "runs").glob("*/config.yaml"))]

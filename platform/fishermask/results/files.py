"""The folder of one sweep, and in it the folder of each run. Any of it can be read while a sweep writes.

results/<sweep>/config.yaml               the sweep as resolved
results/<sweep>/runs/<run>/config.yaml    the run's settings, defaults included
results/<sweep>/runs/<run>/pool.csv       id, class, and whether it was labelled at the start
results/<sweep>/runs/<run>/rounds.jsonl   a line a round
results/<sweep>/runs/<run>/journal.jsonl  picks of the round under way
results/<sweep>/runs/<run>/error.txt      traceback of the last attempt, if it failed
"""

import csv
import fcntl
import filecmp
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fishermask.config import ExperimentConfig, parse
from fishermask.errors import InputError

ROUND_KEYS = {"round", "labels", "accuracy", "balanced_accuracy", "macro_f1", "recall", "batch", "batch_classes"}
ROUND_KEYS |= {"seconds", "ended_by", "epochs", "train_accuracy"}


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last in silence; reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key} stands twice, line {node.start_mark.line + 1} and after")
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a point in a number with an exponent; nobody else does.
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a sweep's folder, so that no second process writes there; the lock ends with this process at the latest.

    Raises:
        InputError: another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"name: another process is writing to {folder}; wait for it, or choose name=NAME"
            ) from None
        yield


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write to a temporary name, then rename: a reader sees the old file or the whole new one."""
    partial = _partial(path)
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def append_line(path: Path, content: Any) -> None:
    """Add a line of JSON, over what a kill left of a line before it; it is on disk when this returns."""
    with path.open("r+b" if path.exists() else "w+b") as file:
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


def read_yaml(path: Path) -> Any:
    """Contents of a YAML file.

    Raises:
        InputError: it is not there, or not YAML.
    """
    try:
        return yaml.load(path.read_text(), StrictLoader)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None


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
        """Make the folder of a run with this config and pool (id, class, labelled at the start).

        A run of the same fingerprint may be there already, and is then continued.

        Raises:
            InputError: the run's first rounds were made with other data.
        """
        make_folder(self.path)
        index = self.path / "pool.csv"
        partial = _partial(index)
        with partial.open("w", encoding="utf-8", newline="") as table:
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(["id", "class", "initial"])
            writer.writerows((name, label, int(initial)) for name, label, initial in pool)
        if self.rounds.exists() and index.exists() and not filecmp.cmp(index, partial, shallow=False):
            partial.unlink()
            raise InputError(
                f"data: its images are not those that {self.path} was begun with; choose another name=NAME"
            )
        partial.replace(index)
        settings = config.model_dump()
        write_atomically(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False))

    def history(self) -> list[dict[str, Any]]:
        """The rounds so far. A last line that a kill cut short does not count.

        Raises:
            InputError: a line in the middle is not what we wrote.
        """
        if not self.rounds.exists():
            return []
        try:
            rounds = [json.loads(line) for line in self.rounds.read_text().split("\n")[:-1]]
            if [(r["round"], r.keys() >= ROUND_KEYS) for r in rounds] == [(i, True) for i in range(len(rounds))]:
                return rounds
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # not JSON, not UTF-8, or JSON of another shape: the same to whoever must mend it
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
            lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []
            for line in map(json.loads, lines):
                first, picks = line["first"], line["picks"]
                if line["query"] == query and first <= len(entries):
                    entries[first : first + len(picks)] = picks
        except (ValueError, KeyError, TypeError):
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


def run_folders(sweep: Path) -> list[RunFolder]:
    """The run folders of a sweep, by name."""
    return [RunFolder(path.parent) for path in sorted((sweep / "runs").glob("*/config.yaml"))]

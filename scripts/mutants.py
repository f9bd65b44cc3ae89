"""Mutation testing: put deliberate mistakes into the source, one at a time, and check that a test fails for each.

    python scripts/mutants.py                   run mutants without a result, then print a table and a summary
    python scripts/mutants.py --list            list the mutants with their numbers
    python scripts/mutants.py 3 10-20 mask.py   run some mutants, by number, range or part of the file's path
    python scripts/mutants.py --whole-suite     also run the surviving mutants against all tests
    python scripts/mutants.py --again           delete earlier results first

``mutant_list.py`` holds the mutants. The script works on a copy of the tree in a temporary folder and never changes the
working tree. Each named test file must first pass on the unchanged copy. For each mutant, the script then runs its test
files in order until a test fails. If a test fails or exceeds the time limit, the mutant is killed; otherwise it has
survived. Each result is written to a JSON file at once, so an interrupted run resumes. A result is valid until the
mutant, its source file or its test files change.

The exit status is 0 if each mutant is killed or has a reason to survive in ``mutant_list.py``, otherwise 1.

The mutants are a list because tools that mutate operators (mutmut, cosmic-ray) make thousands of mutants, each with
minutes of tests, and cannot express mistakes such as training on permuted labels.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("platform/fishermask")
TIME_LIMIT = 900.0
"""Maximum number of seconds for one test file or for the whole suite; both normally take far less."""
ALL_TESTS = ["tests", "--ignore=tests/test_mutants.py"]
"""test_mutants.py is left out because it fails for every mutant: the text to replace is missing."""
PASSED, FAILED, INTERRUPTED = 0, 1, 2
"""Exit statuses of pytest. INTERRUPTED includes a test file that cannot be imported."""


def apply_mutant(text: str, mutant: Mutant) -> str:
    """Return the source ``text`` with the mistake in it.

    Raises:
        ValueError: the text to replace does not occur exactly once.
    """
    count = text.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.file}: {mutant.old!r} occurs {count} times; correct scripts/mutant_list.py")
    return text.replace(mutant.old, mutant.new)


@contextmanager
def copy_tree(root: Path) -> Iterator[Path]:
    """Yield a copy of all files of ``root`` that git tracks or does not ignore, in a temporary folder."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in filter(None, names):
            source, target = root / name, Path(folder, name)
            if source.is_symlink() or source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
        for command in (["git", "init", "-q"], ["git", "add", "."]):  # some tests ask git for the tracked files
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
        yield Path(folder)


def make_environment(tree: Path) -> dict[str, str]:
    """Return an environment in which processes import ``fishermask`` from ``tree``."""
    return os.environ | {"PYTHONPATH": str(tree / "platform"), "PYTHONDONTWRITEBYTECODE": "1"}


def require_copy(tree: Path) -> None:
    """Raise ``RuntimeError`` unless Python imports ``fishermask`` from ``tree``."""
    code = "import fishermask; print(fishermask.__file__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tree, env=make_environment(tree), capture_output=True, text=True, check=True)
    if not Path(done.stdout.strip()).is_relative_to(tree):
        raise RuntimeError(f"Python imports {done.stdout.strip()}, not the copy in {tree}")


def run_tests(tree: Path, paths: Sequence[str], limit: float = TIME_LIMIT) -> tuple[int | None, str]:
    """Run pytest until the first failure; return its exit status (None after the time limit) and its last line."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--durations=0", "--tb=no", *paths]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=tree, env=make_environment(tree), stdout=output, stderr=output, start_new_session=True
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            return None, f"no end within {limit:g} s"
        finally:
            if process.poll() is None:  # the time limit, or this process was interrupted
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read()
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
    return process.returncode, failed[0] if failed else (text.strip().splitlines() or [""])[-1]


def is_killed(status: int | None, line: str) -> bool:
    """Return whether tests noticed the mutant.

    Raises:
        RuntimeError: pytest did not run the tests.
    """
    if status in (PASSED, FAILED, INTERRUPTED, None):
        return status != PASSED
    raise RuntimeError(f"pytest ended with status {status}: {line}")


def run_mutant(tree: Path, mutant: Mutant, whole_suite: bool) -> dict[str, Any]:
    """Put ``mutant`` into ``tree``, run its tests, and restore the file."""
    started, target = time.monotonic(), tree / PACKAGE / mutant.file
    original = target.read_text()
    target.write_text(apply_mutant(original, mutant))
    try:
        for paths in [*([f"tests/test_{name}.py"] for name in mutant.tests.split()), *([ALL_TESTS] * whole_suite)]:
            status, line = run_tests(tree, paths)
            killed = is_killed(status, line)
            if killed:
                break
    finally:
        target.write_text(original)
    by = line if killed else "all tests" if whole_suite else mutant.tests
    return {"killed": killed, "by": by, "whole_suite": whole_suite, "seconds": round(time.monotonic() - started, 1)}


def make_key(root: Path, mutant: Mutant) -> str:
    """Return a hash of the mutant, its source file and its test files, which determine its result."""
    paths = [PACKAGE / mutant.file, *(Path(f"tests/test_{name}.py") for name in mutant.tests.split())]
    contents = [(root / path).read_text() for path in paths]
    content = [mutant.file, mutant.old, mutant.new, mutant.tests, *contents]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def make_baseline_key(root: Path, name: str) -> str:
    """Return a hash of a test file and of the whole package."""
    files = [root / f"tests/test_{name}.py", *sorted((root / PACKAGE).rglob("*.py"))]
    files += sorted((root / PACKAGE / "query_strategies").glob("*.py"))
    return "baseline " + hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def select_mutants(words: Sequence[str], mutants: Sequence[Mutant]) -> list[int]:
    """Return the indices of the mutants that ``words`` name by number, range of numbers or part of the file's path."""
    indices = set()
    for word in words:
        if match := re.fullmatch(r"(\d+)(?:-(\d+))?", word):
            indices |= set(range(int(match[1]) - 1, int(match[2] or match[1])))
        else:
            indices |= {i for i, mutant in enumerate(mutants) if word in mutant.file}
    return sorted(indices & set(range(len(mutants)))) if words else list(range(len(mutants)))


def run(root: Path, mutants: Sequence[Mutant], chosen: list[int], store: Path, whole_suite: bool) -> dict[str, Any]:
    """Run the ``chosen`` mutants that have no result in ``store``; return all results there by key.

    Raises:
        ValueError: a text to replace does not occur exactly once.
        RuntimeError: tests fail without any mutant, or do not run.
    """
    for i in chosen:  # report mistakes in the list before the tests run
        apply_mutant((root / PACKAGE / mutants[i].file).read_text(), mutants[i])
    results: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}

    def is_missing(i: int) -> bool:
        result = results.get(make_key(root, mutants[i]))
        return result is None or (whole_suite and not result["killed"] and not result["whole_suite"])

    def store_result(name: str, result: Any) -> None:
        results[name] = result
        store.parent.mkdir(parents=True, exist_ok=True)
        partial = store.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1))
        partial.replace(store)

    pending = [i for i in chosen if is_missing(i)]
    if not pending:
        return results
    with copy_tree(root) as tree:
        require_copy(tree)
        broken: dict[str, str] = {}
        for i in pending:
            names = mutants[i].tests.split()
            for name in names:
                if make_baseline_key(tree, name) not in results and name not in broken:
                    status, line = run_tests(tree, [f"tests/test_{name}.py"])
                    if status == PASSED:
                        store_result(make_baseline_key(tree, name), "passed")
                    else:
                        broken[name] = f"tests/test_{name}.py does not pass without a mutant: {line}"
            if not broken.keys() & set(names):
                result = run_mutant(tree, mutants[i], whole_suite)
                store_result(
                    make_key(tree, mutants[i]), result
                )  # key of the copy, because the working tree may have changed
                print(format_row(i, mutants[i], result), flush=True)
        if broken:
            raise RuntimeError("\n".join(broken.values()))
    return results


def format_row(i: int, mutant: Mutant, result: dict[str, Any] | None) -> str:
    """Return one line of the table."""
    state = "-" if result is None else "killed" if result["killed"] else "SURVIVED"
    by = "" if result is None else f"  [{result['by'].removeprefix('tests/')}, {result['seconds']:.0f} s]"
    return f"{i + 1:4} {state:9} {mutant.file:28} {mutant.breaks}{by}"


def report(root: Path, mutants: Sequence[Mutant], chosen: list[int], results: dict[str, Any]) -> int:
    """Print the table and the summary; return how many mutants survived without a reason."""
    chosen_results = {i: results.get(make_key(root, mutants[i])) for i in chosen}
    survivors = [i for i, result in chosen_results.items() if result and not result["killed"]]
    for i, result in chosen_results.items():
        print(format_row(i, mutants[i], result))
    for i in survivors:
        print(f"survived: {i + 1} {mutants[i].file}: {mutants[i].breaks}; {mutants[i].reason or 'NO REASON GIVEN'}")
    for i, result in chosen_results.items():
        if mutants[i].reason and result is not None and result["killed"]:
            print(f"stale reason: {i + 1} {mutants[i].file} is killed")
    finished = [i for i, result in chosen_results.items() if result is not None]
    print(f"{len(finished) - len(survivors)} of {len(finished)} mutants killed")
    return sum(not mutants[i].reason for i in survivors)


def main(argv: Sequence[str] | None = None, root: Path = ROOT, mutants: Sequence[Mutant] = MUTANTS) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Mutation testing with the mutants of scripts/mutant_list.py.")
    parser.add_argument("which", nargs="*", help="numbers, ranges such as 10-20, or parts of a file's path")
    parser.add_argument("--list", action="store_true", help="list the mutants and run none")
    parser.add_argument("--whole-suite", action="store_true", help="run survivors against all tests")
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    parser.add_argument("--results", type=Path, help="JSON file of the results (build/mutants.json)")
    arguments = parser.parse_args(argv)
    store = arguments.results or root / "build/mutants.json"
    chosen = select_mutants(arguments.which, mutants)
    if arguments.list:
        for i in chosen:
            print(f"{i + 1:4} {mutants[i].file:28} {mutants[i].breaks}  [{mutants[i].tests}]")
        return 0
    # An exception stops the running tests and removes the copy. By default, a background job ignores SIGINT.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments.again:
        store.unlink(missing_ok=True)
    return int(report(root, mutants, chosen, run(root, mutants, chosen, store, arguments.whole_suite)) > 0)


if __name__ == "__main__":
    sys.exit(main())

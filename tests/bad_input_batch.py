"""Run many commands in one process, which imports torch once. ``test_bad_input`` starts this script.

Usage: python bad_input_batch.py JOBS RESULTS, two JSON files. Output is captured at the file descriptors, including
lines that libraries print from C.
"""

import hashlib
import json
import os
import signal
import stat
import sys
import tempfile
import time
import traceback
from pathlib import Path

from fishermask import cli, query_strategies
from fishermask.experiment import inputs

SECONDS = 20
"""Time limit of a command."""


class TooLong(BaseException):
    """A command exceeded its time limit. No ``Exception``, so that the command does not convert it to a message."""


def snapshot(folder: Path) -> list[list[str]]:
    """Return every file, folder and link below ``folder`` with a hash of its content."""
    entries = []
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else str(stat.S_IFMT(mode))
        entries.append([str(path.relative_to(folder)), content])
    return entries


def too_long(*_: object) -> None:
    raise TooLong


def run(job: dict, output: tuple) -> dict:
    """Return the exit status of a command, its output, its exception and the files that it left."""
    folder = Path(job["folder"])
    os.chdir(folder)
    before, environment = snapshot(folder), dict(os.environ)
    os.environ.update(job["env"])
    inputs.load_pool.cache_clear()  # it would hide a cache or a file that cannot be read
    descriptors = [os.dup(1), os.dup(2)]
    for number, file in zip((1, 2), output, strict=True):
        file.seek(0)
        file.truncate()
        os.dup2(file.fileno(), number)
    status, error, started = None, "", time.monotonic()
    signal.alarm(SECONDS)
    try:
        status = cli.main([os.fsdecode(bytes.fromhex(word)) for word in job["argv"]])
    except TooLong:
        error = f"still running after {SECONDS} s"
    except BaseException:
        error = traceback.format_exc()
    finally:
        signal.alarm(0)
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in zip((1, 2), descriptors, strict=True):
            os.dup2(saved, number)
            os.close(saved)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
    texts = []
    for file in output:
        file.seek(0)
        texts.append(file.read().decode(errors="replace"))
    seconds = time.monotonic() - started
    result = {"status": status, "stdout": texts[0], "stderr": texts[1], "raised": error, "seconds": seconds}
    return result | {"trace": [entry for entry in snapshot(folder) if entry not in before]}


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    sys.path.insert(0, jobs["models"])
    query_strategies.__path__.append(jobs["strategies"])
    signal.signal(signal.SIGALRM, too_long)
    results = {}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        for job in jobs["cases"]:
            results[job["id"]] = run(job, (out, err))
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()

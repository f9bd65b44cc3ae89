"""The boundary around code and files of the user: whatever they raise becomes one line that names the setting."""

import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fishermask.errors import InputError

MAX_REASON = 240
"""Characters of an exception's message that are shown; the log file has all of it."""


@contextmanager
def guarded(setting: str, problem: str, passing: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Turn every exception of the block into an ``InputError``: ``setting: problem (type: message)``.

    ``SystemExit``, ``RecursionError`` and ``MemoryError`` are no exception to that. ``InputError`` and
    ``KeyboardInterrupt`` pass unchanged.

    Args:
        setting: the dotted path of the setting, or the file, that the user must correct.
        problem: what does not work, as a clause: "my.models:make does not make a model".
        passing: exceptions that pass too. A generator that yields inside the block needs ``GeneratorExit``.

    Raises:
        InputError: the block raised; ``details`` holds the traceback.
    """
    unchanged: tuple[type[BaseException], ...] = (InputError, KeyboardInterrupt, *passing)
    try:
        yield
    except unchanged:
        raise
    except BaseException as error:
        raise InputError(f"{setting}: {problem} ({reason(error)})", _traceback(error)) from error


def reason(error: BaseException) -> str:
    """Return the type and the message of ``error`` in one line."""
    kind = type(error).__name__
    try:
        if isinstance(error, SystemExit):
            text = f"it exits with status {error.code}"
        elif isinstance(error, OSError) and error.strerror:
            text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        else:
            text = str(error)
    except BaseException:  # a user's exception may be unable to describe itself
        text = ""
    text = one_line(text)
    return f"{kind}: {text}" if text else kind


def one_line(text: str, limit: int = MAX_REASON) -> str:
    """Return ``text`` without line breaks and control characters, cut to ``limit`` characters."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text[: 20 * limit]).split())
    return words if len(words) <= limit else words[: limit - 3] + "..."


def short(value: object) -> str:
    """Return ``repr``, cut to what fits in a message of one line."""
    try:
        text = repr(value)
    except Exception:  # a number too long for Python to print, or an object of the user's
        text = f"a value of type {type(value).__name__}"
    return one_line(text, 60)


def _traceback(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except BaseException as second:  # the same, or no memory is left
        return f"{type(error).__name__}; its traceback cannot be shown ({type(second).__name__})\n"


def write_log(text: str) -> str:
    """Write ``text`` to a new file in the system's folder for temporary files; return its path.

    Only the user can read the file. If no such folder can be written to, the returned text says why.
    """
    try:
        # tempfile falls back to the working folder, where nothing must be left behind.
        folder = tempfile.gettempdir()
        if Path(folder) == Path.cwd():
            return "none, there is no folder for temporary files"
        handle, path = tempfile.mkstemp(prefix="fishermask-", suffix=".log", dir=folder)
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        return f"none, {error.strerror}"
    return path


class Held:
    """What was written to stderr while it was held."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def text(self) -> str:
        """Return everything so far, and forget it."""
        self._file.seek(0)
        content = self._file.read().decode(errors="replace")
        self._file.seek(0)
        self._file.truncate()
        return content


@contextmanager
def held_stderr() -> Iterator[Held]:
    """Keep what the block writes to stderr: warnings, and lines that libraries print from C.

    The file descriptor is redirected, so that ``sys.stderr``, log handlers that hold on to it and subprocesses follow.
    """
    with os.fdopen(os.memfd_create("fishermask-stderr"), "w+b") as file:
        before, saved = sys.stderr, None
        with suppress(OSError):  # the descriptor may be closed
            saved = os.dup(2)
        if before is not None:
            before.flush()
        if saved is not None:
            os.dup2(file.fileno(), 2)
        if not _writes_to_descriptor(before):
            sys.stderr = os.fdopen(os.dup(file.fileno()), "w", 1, encoding="utf-8", errors="backslashreplace")
        try:
            yield Held(file)
        finally:
            with suppress(OSError, ValueError, AttributeError):
                sys.stderr.flush()
            sys.stderr = before
            if saved is not None:
                os.dup2(saved, 2)
                os.close(saved)


def _writes_to_descriptor(stream: Any) -> bool:
    try:
        return bool(stream.fileno() == 2)
    except (AttributeError, OSError, ValueError):
        return False

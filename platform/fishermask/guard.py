"""Guards around calls into the user's code and files: any exception becomes a one-line error that names the setting."""

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
"""Maximum number of characters of an exception's message in an error; the log file holds the whole message."""


@contextmanager
def guarded(setting: str, problem: str, passing: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Convert every exception of the block to an ``InputError``: ``setting: problem (type: message)``.

    This includes ``SystemExit``, ``RecursionError`` and ``MemoryError``. ``InputError`` and ``KeyboardInterrupt``
    pass unchanged.

    Args:
        setting: dotted path of the setting, or the file, that the user must correct.
        problem: the problem as a clause: "my.models:make does not return a model".
        passing: further exception types that pass unchanged. A generator that yields inside the block needs
            ``GeneratorExit``.

    Raises:
        InputError: the block raised an exception; ``details`` holds the traceback.
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
    except BaseException:  # str() of a user's exception may raise
        text = ""
    text = one_line(text)
    return f"{kind}: {text}" if text else kind


def one_line(text: str, limit: int = MAX_REASON) -> str:
    """Return ``text`` without line breaks and control characters, truncated to ``limit`` characters."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text[: 20 * limit]).split())
    return words if len(words) <= limit else words[: limit - 3] + "..."


def plural(count: int, noun: str) -> str:
    """Return ``1 run`` or ``2 runs``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def short(value: object) -> str:
    """Return ``repr(value)``, truncated to fit in a one-line message."""
    try:
        text = repr(value)
    except Exception:  # an integer that is too long for Python to print, or an object from the user's code
        text = f"a value of type {type(value).__name__}"
    return one_line(text, 60)


def _traceback(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except BaseException as failure:  # str() of the exception raises, or memory is exhausted
        return f"{type(error).__name__}; its traceback cannot be shown ({type(failure).__name__})\n"


def write_log(text: str) -> str:
    """Write ``text`` to a new temporary file that only the user can read, and return its path.

    If no temporary folder is writable, return a text that says why there is no file.
    """
    try:
        # tempfile falls back to the working folder, where the command must not leave files.
        folder = tempfile.gettempdir()
        if Path(folder) == Path.cwd():
            return "none, there is no folder for temporary files"
        handle, path = tempfile.mkstemp(prefix="fishermask-", suffix=".log", dir=folder)
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        return f"none, {error.strerror}"
    return path


class CapturedStderr:
    """The text that is written to stderr inside ``capture_stderr``."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def pop_text(self) -> str:
        """Return the text written since the last call, and delete it."""
        self._file.seek(0)
        content = self._file.read().decode(errors="replace")
        self._file.seek(0)
        self._file.truncate()
        return content


@contextmanager
def capture_stderr() -> Iterator[CapturedStderr]:
    """Capture what the block writes to stderr: warnings, and lines that libraries print from C.

    The file descriptor is redirected, so output of ``sys.stderr``, existing log handlers and subprocesses is captured.

    Raises:
        InputError: no temporary file can be made.
    """
    try:
        temporary_file = tempfile.TemporaryFile(prefix="fishermask-")  # noqa: SIM115  closed by the block below
    except OSError as error:
        problem = f"cannot make a temporary file ({error.strerror}); set TMPDIR to a folder that you can write to"
        raise InputError(f"TMPDIR: {problem}") from None
    with temporary_file as file:
        stderr, saved_descriptor = sys.stderr, None
        with suppress(OSError):  # the descriptor may be closed
            saved_descriptor = os.dup(2)
        if stderr is not None:
            stderr.flush()
        if saved_descriptor is not None:
            os.dup2(file.fileno(), 2)
        if not _writes_to_descriptor(stderr):
            sys.stderr = os.fdopen(os.dup(file.fileno()), "w", 1, encoding="utf-8", errors="backslashreplace")
        try:
            yield CapturedStderr(file)
        finally:
            with suppress(OSError, ValueError, AttributeError):
                sys.stderr.flush()
            sys.stderr = stderr
            if saved_descriptor is not None:
                os.dup2(saved_descriptor, 2)
                os.close(saved_descriptor)


def _writes_to_descriptor(stream: Any) -> bool:
    try:
        return bool(stream.fileno() == 2)
    except (AttributeError, OSError, ValueError):
        return False

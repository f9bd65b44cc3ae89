"""Stop a command cleanly: the first signal starts the cleanup, a later signal ends the process without a traceback.

SIGINT (Ctrl-C), SIGTERM and the loss of a process that the command needs are handled in the same way: ``Stopped`` is
raised in the main thread, where Python would raise ``KeyboardInterrupt`` after SIGINT.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

FAILED, INTERRUPTED, TERMINATED = 1, 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit statuses: a process that the command needs is lost; the shell's statuses after SIGINT and SIGTERM."""

REPEAT_SECONDS = 1.0
"""Signals within this time after the first are ignored: the terminal and a wrapper may both send the same signal."""


class Stopped(KeyboardInterrupt):
    """The command must stop. Code that handles Ctrl-C handles this exception too.

    Attributes:
        status: exit status of the command.
    """

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


class _State:
    """State of the command that runs in this process."""

    installed = False
    """Whether the handlers are installed."""
    failure: str | None = None
    """Why ``request_stop`` was called."""
    stopped: Stopped | None = None
    stopped_at = 0.0


_state = _State()


@contextmanager
def handle_signals() -> Iterator[None]:
    """Raise ``Stopped`` in the block at the first SIGINT or SIGTERM, and end the process at a later one.

    Outside the main thread, where Python handles no signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.installed, _state.failure, _state.stopped = True, None, None
    previous = {number: signal.signal(number, _handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _state.installed = False
        for number, handler in previous.items():
            signal.signal(number, handler)


def reinstall_handlers() -> None:
    """Install the handlers of ``handle_signals`` again, after a library has replaced them."""
    if _state.installed and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _handle)


def stop_reason(interrupt: KeyboardInterrupt) -> Stopped:
    """Return the ``Stopped`` that caused ``interrupt``; libraries may have replaced it with a ``KeyboardInterrupt``."""
    if isinstance(interrupt, Stopped):
        return interrupt
    return _state.stopped or Stopped("interrupted", INTERRUPTED)


def request_stop(reason: str) -> None:
    """Stop the command, from any thread, with status ``FAILED``. Do nothing if it is stopping already."""
    if _state.installed and _state.stopped is None:
        _state.failure = reason
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _handle(number: int, frame: FrameType | None) -> None:
    if _state.stopped is None:
        _state.stopped_at = time.monotonic()
        if _state.failure is not None:
            _state.stopped = Stopped(_state.failure, FAILED)
        elif number == signal.SIGTERM:
            _state.stopped = Stopped("terminated", TERMINATED)
        else:
            _state.stopped = Stopped("interrupted", INTERRUPTED)
        raise _state.stopped
    if time.monotonic() - _state.stopped_at > REPEAT_SECONDS:
        # As safe as SIGKILL: the files of a run are complete at any time.
        os._exit(_state.stopped.status)

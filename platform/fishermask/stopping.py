"""Stopping a command: the first signal lets it clean up, a later one ends it at once, none gives a traceback.

Ctrl-C (SIGINT), SIGTERM and the loss of what the command depends on take the same way: ``Stopped`` is raised in the
main thread, as ``KeyboardInterrupt`` is by default.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

FAILED, INTERRUPTED, TERMINATED = 1, 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit statuses: what the command needs is lost, and a shell's for a command that a signal ended."""

SAME = 1.0
"""Seconds within which a second signal counts as the first: wrappers forward a signal that the terminal sent too."""


class Stopped(KeyboardInterrupt):
    """The command was told to stop; whatever handles Ctrl-C handles it.

    Attributes:
        status: the exit status that the command should have.
    """

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


class _State:
    """What has happened to the command that runs in this process."""

    active = False
    """Whether the handlers are installed."""
    loss: str | None = None
    """What the command depends on and has lost."""
    stopped: Stopped | None = None
    since = 0.0


_state = _State()


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise ``Stopped`` in the block at the first SIGINT or SIGTERM; end the process at a later one.

    In another thread than the main one, where no signal can be handled, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.active, _state.loss, _state.stopped = True, None, None
    before = {number: signal.signal(number, _handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _state.active = False
        for number, handler in before.items():
            signal.signal(number, handler)


def handle_again() -> None:
    """Install the handlers once more, inside ``stoppable``, after a library has replaced them."""
    if _state.active and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _handle)


def cause(interrupt: KeyboardInterrupt) -> Stopped:
    """Return why ``interrupt`` was raised: libraries raise one of their own in place of ``Stopped``."""
    if isinstance(interrupt, Stopped):
        return interrupt
    return _state.stopped or Stopped("interrupted", INTERRUPTED)


def stop(loss: str) -> None:
    """Stop the command from any of its threads, because of ``loss``; nothing happens if it stops already."""
    if _state.active and _state.stopped is None:
        _state.loss = loss
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _handle(number: int, frame: FrameType | None) -> None:
    if _state.stopped is None:
        _state.since = time.monotonic()
        if _state.loss is not None:
            _state.stopped = Stopped(_state.loss, FAILED)
        elif number == signal.SIGTERM:
            _state.stopped = Stopped("terminated", TERMINATED)
        else:
            _state.stopped = Stopped("interrupted", INTERRUPTED)
        raise _state.stopped
    if time.monotonic() - _state.since > SAME:
        # What a cleanup leaves behind is what a killed process leaves: files are written to be complete at any time.
        os._exit(_state.stopped.status)

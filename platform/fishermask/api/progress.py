"""Progress of ``fishermask.select``: no output, calls of the user's function, or a progress bar."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.progress import Progress as Bar

from fishermask.errors import InputError
from fishermask.guard import short
from fishermask.pool.pool import Progress

DELAY = 2.0
"""Seconds after which a bar appears."""


@contextmanager
def reporter(progress: bool | Callable[[str, int, int], object] | None) -> Iterator[Progress]:
    """Yield a function that reports progress in the way that ``progress`` selects.

    Args:
        progress: True for a bar, which appears after two seconds; a function; None or False for no output.

    Raises:
        InputError: ``progress`` is none of these.
    """
    if progress is not True and progress is not False and progress is not None and not callable(progress):
        raise InputError(f"progress: is {short(progress)}; expected True, False or a function (stage, done, total)")
    if not progress:
        yield lambda stage, done, total: None
        return
    if callable(progress):
        function = progress
        yield lambda stage, done, total: (function(stage, done, total), None)[1]
        return
    started = time.monotonic()
    with ExitStack() as stack:
        bar = Bar(transient=True)
        task = bar.add_task("")

        def show(stage: str, done: int, total: int) -> None:
            if not bar.live.is_started and time.monotonic() - started > DELAY:
                stack.enter_context(bar)
            bar.update(task, description=stage, completed=done, total=total)

        yield show

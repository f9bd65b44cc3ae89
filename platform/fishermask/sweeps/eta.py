"""How far the stages of a query are, how long each has to go, and how long all runs have."""

import time
from collections.abc import Sequence


def format_duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def time_left(elapsed: float, models: Sequence[float], queries: Sequence[float], rounds: int, batches: int) -> float:
    """Seconds that ``rounds`` more rounds take which query ``batches``: a run's last round trains, and queries nothing.

    Each round to come takes as long as the mean model so far, and if it queries as the mean query. That is the work of
    one run after the other; several at once have been faster than that, and will be.

    Args:
        elapsed: seconds since the start.
        models: seconds of training and evaluation in each finished round.
        queries: seconds of each finished query.
    """
    work = rounds * sum(models) / len(models) + (batches * sum(queries) / len(queries) if queries else 0.0)
    return elapsed * work / (sum(models) + sum(queries))


class StageTimer:
    """Times the current stage of each of several runs."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[str, int, float]] = {}
        self._last: dict[str, int] = {}

    def update(self, run: str, stage: str, done: int, total: int, now: float | None = None) -> str:
        """``pick 35/100, ETA 0:12``: a line on a stage of ``run`` of which ``done`` parts are done."""
        now = time.monotonic() if now is None else now
        if run not in self._began or self._began[run][0] != stage or done < self._last[run]:
            self._began[run] = stage, done, now
        self._last[run] = done
        if total <= 1:
            return stage
        _, first, since = self._began[run]
        left = f", ETA {format_duration((now - since) / (done - first) * (total - done))}" if done > first else ""
        return f"{stage} {done}/{total}{left}"

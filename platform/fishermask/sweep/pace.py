"""How far the stages of a query are, and how long each has to go."""

import time


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Pace:
    """Times the current stage of each of several runs."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[str, int, float]] = {}
        self._last: dict[str, int] = {}

    def tell(self, run: str, stage: str, done: int, total: int, now: float | None = None) -> str:
        """``pick 35/100, ETA 0:12``: a line on a stage of ``run`` of which ``done`` parts are done."""
        now = time.monotonic() if now is None else now
        if run not in self._began or self._began[run][0] != stage or done < self._last[run]:
            self._began[run] = stage, done, now
        self._last[run] = done
        if total <= 1:
            return stage
        _, first, since = self._began[run]
        left = f", ETA {clock((now - since) / (done - first) * (total - done))}" if done > first else ""
        return f"{stage} {done}/{total}{left}"

"""Estimates of the time until all runs are finished, from plans, measured rounds and current stages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fishermask.experiment.run_plan import RunPlan

EPOCHS_SHARE = 0.5
"""Share of the remaining epochs that training is expected to need before it reaches the target accuracy."""
MODEL_STAGES = ("train", "evaluate")


def format_duration(seconds: float) -> str:
    """Return ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RoundSeconds(NamedTuple):
    """Duration of a round: of training and evaluation, and of the query."""

    model: float
    query: float


def planned_rounds(plan: RunPlan) -> list[RoundSeconds]:
    """Return the planned duration of each round of a run; the last round has no query."""
    budget, num_rounds = plan.config.budget, plan.config.budget.num_rounds
    epochs = EPOCHS_SHARE * plan.config.training.max_epochs
    return [
        RoundSeconds(
            plan.measurement.training.image_seconds * epochs * min(budget.initial + index * budget.query, budget.total),
            plan.query.seconds if index + 1 < num_rounds else 0.0,
        )
        for index in range(num_rounds)
    ]


@dataclass
class _Stage:
    """The current stage of a run. Times are seconds of one clock."""

    name: str
    done: int
    total: int
    first_done: int
    """Parts that were done at the first report of the stage."""
    since: float
    """Time of the first report."""
    updated: float
    """Time of the last report."""
    part_since: float
    """Start of the current part of the round: training and evaluation, or the query."""

    def seconds_left(self, now: float) -> float | None:
        """Return the remaining time of the stage at its speed so far; None before the speed is known."""
        if self.done <= self.first_done:
            return None
        seconds = (self.updated - self.since) / (self.done - self.first_done) * (self.total - self.done)
        return max(0.0, seconds - (now - self.updated))


class _Ratio:
    """Measured seconds divided by planned seconds, by strategy."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, strategy: str, measured: float, planned: float) -> None:
        sums = self.sums.get(strategy, (0.0, 0.0))
        self.sums[strategy] = sums[0] + measured, sums[1] + planned

    def get(self, strategy: str) -> float:
        """Return the ratio of a strategy; without its measurements, the ratio of all strategies; without any, 1."""
        all_sums = tuple(map(sum, zip(*self.sums.values(), strict=True))) or (0.0, 0.0)
        measured, planned = self.sums.get(strategy, all_sums)
        return measured / planned if planned else 1.0


class TimeEstimator:
    """Estimates the time until all of several runs are finished. Times are seconds of one clock.

    Args:
        planned: planned duration of all rounds of each run, by the run's name.
        strategies: strategy of each run.
        finished: finished rounds of each run.
    """

    def __init__(
        self, planned: Mapping[str, list[RoundSeconds]], strategies: Mapping[str, str], finished: Mapping[str, int]
    ) -> None:
        self.strategies = strategies
        self.next_round = dict(finished)
        self.planned = dict(planned)
        # For each run and each round, the planned duration of this round and all later ones.
        self.planned_from = {name: _sums_from(rounds) for name, rounds in planned.items()}
        self.model_ratio, self.query_ratio = _Ratio(), _Ratio()
        self.stages: dict[str, _Stage] = {}
        self.max_concurrent = 0
        """Largest number of concurrent runs so far."""

    def start_stage(self, run: str, stage: str, done: int, total: int, now: float) -> None:
        """Record that ``done`` of ``total`` parts of a stage are done."""
        last = self.stages.get(run)
        if last is not None and last.name == stage and done >= last.done:
            last.done, last.total, last.updated = done, total, now
            return
        part_since = now
        if last is not None and (stage in MODEL_STAGES) == (last.name in MODEL_STAGES):
            part_since = last.part_since
        self.stages[run] = _Stage(stage, done, total, done, now, now, part_since)
        self.max_concurrent = max(self.max_concurrent, len(self.stages))

    def finish_round(self, run: str, seconds: RoundSeconds, now: float) -> None:
        """Record the duration of the current round of a run, and begin the next round."""
        planned, strategy = self.planned[run][self.next_round[run]], self.strategies[run]
        self.model_ratio.add(strategy, seconds.model, planned.model)
        self.query_ratio.add(strategy, seconds.query, planned.query)
        self.next_round[run] += 1
        self.stages.pop(run, None)
        if self.next_round[run] < len(self.planned[run]):
            self.start_stage(run, MODEL_STAGES[0], 0, 1, now)
        else:
            self.remove(run)

    def remove(self, run: str) -> None:
        """Stop counting a run, because it is finished or failed."""
        self.stages.pop(run, None)
        self.planned.pop(run, None)

    def seconds_left(self, now: float) -> float | None:
        """Return the time until all runs are finished; None before the first run has begun.

        Assume that as many runs are concurrent as the most so far.
        """
        if not self.max_concurrent:
            return None
        seconds = [self._run_seconds(run, now) for run in self.planned]
        return max(sum(seconds) / self.max_concurrent, max(seconds, default=0.0))

    def round_fraction(self, run: str, now: float) -> float:
        """Return the finished fraction of a run's current round, from 0 to 1."""
        stage = self.stages.get(run)
        if stage is None:
            return 0.0
        elapsed, remaining = now - stage.part_since, self._round_seconds(run, now)
        if stage.name not in MODEL_STAGES:
            elapsed += self._expected(run, self.planned[run][self.next_round[run]]).model
        return elapsed / (elapsed + remaining) if elapsed else 0.0

    def _expected(self, run: str, planned: RoundSeconds) -> RoundSeconds:
        strategy = self.strategies[run]
        return RoundSeconds(
            planned.model * self.model_ratio.get(strategy), planned.query * self.query_ratio.get(strategy)
        )

    def _run_seconds(self, run: str, now: float) -> float:
        later_rounds = self.planned_from[run][self.next_round[run] + 1]
        return self._round_seconds(run, now) + sum(self._expected(run, later_rounds))

    def _round_seconds(self, run: str, now: float) -> float:
        """Return the remaining time of a run's current round."""
        expected = self._expected(run, self.planned[run][self.next_round[run]])
        stage = self.stages.get(run)
        if stage is None:
            return sum(expected)
        elapsed, stage_left = now - stage.part_since, stage.seconds_left(now)
        if stage.name in MODEL_STAGES:
            remaining = max(0.0, expected.model - elapsed)
            if stage.name == "train" and stage_left is not None and (not remaining or not self.model_ratio.sums):
                remaining = EPOCHS_SHARE * stage_left
            return remaining + expected.query
        if stage.name == "pick" and stage_left is not None:
            return stage_left
        return max(expected.query - elapsed, stage_left or 0.0)


def _sums_from(rounds: list[RoundSeconds]) -> list[RoundSeconds]:
    """Return the sums of ``rounds[i:]`` for i from 0 to the length of ``rounds``."""
    sums = [RoundSeconds(0.0, 0.0)]
    for seconds in reversed(rounds):
        sums.append(RoundSeconds(sums[-1].model + seconds.model, sums[-1].query + seconds.query))
    return sums[::-1]

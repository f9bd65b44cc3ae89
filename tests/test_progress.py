"""Progress of runs: estimates of the remaining time, and the lines that show it."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from fishermask.config import ExperimentConfig, parse
from fishermask.planning.workload import Cost
from fishermask.results.files import RunFolder
from fishermask.sweeps.eta import RoundSeconds, TimeEstimator, planned_rounds
from fishermask.sweeps.recorder import Recorder, describe_stage, quiet_seconds
from fishermask.sweeps.sweep_file import Run

CONFIG = parse(
    ExperimentConfig,
    {"budget": {"initial": 10, "query": 20, "total": 40}, "training": {"max_epochs": 60}, "strategy": "margin"},
)
# 0.01 s per image and epoch, and 8 s per query: rounds of 3 + 8, 9 + 8 and 12 s where half of the epochs are needed.
PLAN = SimpleNamespace(
    config=CONFIG, measurement=SimpleNamespace(training=Cost(image_seconds=0.01)), query=SimpleNamespace(seconds=8.0)
)


def make_estimator(num_runs=1, finished=0):
    names = [f"run-{i}" for i in range(num_runs)]
    return TimeEstimator(
        dict.fromkeys(names, planned_rounds(PLAN)), dict.fromkeys(names, "margin"), dict.fromkeys(names, finished)
    )


def test_planned_rounds_grow_with_the_labels_and_the_last_has_no_query():
    assert planned_rounds(PLAN) == [RoundSeconds(3.0, 8.0), RoundSeconds(9.0, 8.0), RoundSeconds(12.0, 0.0)]


def test_eta_exists_in_round_0_and_follows_the_picks():
    eta = make_estimator()
    assert eta.seconds_left(0.0) is None
    eta.start_stage("run-0", "train", 0, 60, 0.0)
    assert eta.seconds_left(0.0) == 40.0
    assert eta.seconds_left(2.0) == 38.0
    assert eta.seconds_left(9.0) == 37.0  # training takes longer than planned
    eta.start_stage("run-0", "train", 20, 60, 10.0)
    assert eta.seconds_left(10.0) == 10.0 + 37.0  # half of the 40 remaining epochs at 2 a second
    eta.start_stage("run-0", "evaluate", 0, 100, 12.0)
    eta.start_stage("run-0", "embed", 0, 20, 13.0)
    assert eta.seconds_left(13.0) == 37.0
    eta.start_stage("run-0", "embed", 10, 20, 33.0)
    assert eta.seconds_left(33.0) == 20.0 + 29.0  # the query takes longer than planned
    eta.start_stage("run-0", "pick", 5, 25, 60.0)
    assert eta.seconds_left(60.0) == 29.0
    eta.start_stage("run-0", "pick", 10, 25, 70.0)
    assert eta.seconds_left(70.0) == 30.0 + 29.0
    assert eta.seconds_left(72.0) == 28.0 + 29.0
    # 3 s of training and 59 s of the query are over, and 28 s of the query are left.
    assert eta.round_fraction("run-0", 72.0) == pytest.approx(62 / 90)


def test_eta_scales_plans_by_measured_rounds():
    eta = make_estimator()
    eta.start_stage("run-0", "train", 0, 60, 0.0)
    eta.finish_round("run-0", RoundSeconds(6.0, 4.0), 10.0)  # twice the plan, and half of it
    assert eta.seconds_left(10.0) == 2 * 9 + 8 / 2 + 2 * 12
    eta.start_stage("run-0", "train", 1, 60, 11.0)
    assert eta.seconds_left(11.0) == 2 * 9 + 8 / 2 + 2 * 12 - 1
    eta.finish_round("run-0", RoundSeconds(18.0, 4.0), 32.0)
    assert eta.seconds_left(32.0) == 24.0
    eta.finish_round("run-0", RoundSeconds(24.0, 0.0), 56.0)
    assert eta.seconds_left(56.0) == 0.0


def test_eta_assumes_as_many_concurrent_runs_as_before():
    eta = make_estimator(num_runs=4)
    eta.start_stage("run-0", "train", 0, 60, 0.0)
    assert eta.seconds_left(0.0) == 4 * 40.0
    eta.start_stage("run-1", "train", 0, 60, 0.0)
    assert eta.seconds_left(0.0) == 2 * 40.0
    eta.remove("run-1")
    assert eta.seconds_left(0.0) == 60.0
    eta.remove("run-2")
    eta.remove("run-3")
    assert eta.seconds_left(0.0) == 40.0  # a single run cannot proceed twice at once


def test_eta_of_a_resumed_run_leaves_out_finished_rounds():
    eta = make_estimator(finished=2)
    eta.start_stage("run-0", "train", 0, 60, 0.0)
    assert eta.seconds_left(0.0) == 12.0


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        (("train", 12, 60), "training, 12 of at most 60 epochs"),
        (("evaluate", 0, 1), "evaluation"),
        (("embed", 7, 20), "embeddings 35%"),
        (("pick", 35, 100), "pick 35/100"),
    ],
)
def test_stages_are_described_in_words(stage, text):
    assert describe_stage(*stage) == text


def make_result(index):
    return {
        "round": index, "labels": 10 + 20 * index, "accuracy": 0.5, "balanced_accuracy": 0.25, "macro_f1": None,
        "recall": {"cat": None}, "epochs": 3, "train_accuracy": 1.0, "ended_by": "cap",
        "seconds": {"train": 3.0, "evaluate": 0.0, "query": 8.0}, "batch": [], "batch_classes": {},
    }  # fmt: skip


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def make_recorder(tmp_path, clock, terminal):
    run = Run("margin-seed=0", CONFIG, RunFolder(tmp_path))
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, highlight=False)
    return Recorder([(run, [])], {run.name: PLAN}, [], console, every_round=True, clock=clock)


def test_without_a_terminal_lines_show_progress_within_round_0_and_do_not_flood(tmp_path):
    clock = Clock()
    with make_recorder(tmp_path, clock, terminal=False) as recorder:
        for index in range(3):
            for pick in range(101):  # one per second
                recorder.show_stage("margin-seed=0", "pick", pick, 100)
                clock.seconds += 1.0
            recorder.record("margin-seed=0", make_result(index))
    lines = recorder.console.file.getvalue().splitlines()
    assert lines[0] == "[0/1 runs, 0/3 rounds, ETA 1:59] margin-seed=0: round 1/3, pick 10/100"
    assert len([line for line in lines if "round 1/3" in line]) == 10
    assert [line for line in lines if "labels" in line] == [
        "[0/1 runs, 1/3 rounds, ETA 0:29] margin-seed=0: labels 10, balanced accuracy 0.250, 3 epochs (cap), "
        "train 3.0 s, evaluate 0.0 s, query 8.0 s",
        "[0/1 runs, 2/3 rounds, ETA 0:06] margin-seed=0: labels 30, balanced accuracy 0.250, 3 epochs (cap), "
        "train 3.0 s, evaluate 0.0 s, query 8.0 s",
        "[1/1 runs, 3/3 rounds, ETA 0:00] margin-seed=0: labels 50, balanced accuracy 0.250, 3 epochs (cap), "
        "train 3.0 s, evaluate 0.0 s, query 8.0 s",
    ]
    assert [quiet_seconds(elapsed) for elapsed in (0.0, 1200.0, 1e6)] == [10.0, 60.0, 300.0]


def test_a_terminal_shows_the_current_stage_and_moves_within_a_round(tmp_path):
    clock = Clock()
    with make_recorder(tmp_path, clock, terminal=True) as recorder:
        task = recorder.bar.tasks[0]
        recorder.show_stage("margin-seed=0", "pick", 0, 100)
        clock.seconds = 35.0
        recorder.show_stage("margin-seed=0", "pick", 35, 100)
        assert task.description == "0/1 runs  margin-seed=0: round 1/3, pick 35/100"
        assert task.fields["eta"] == "ETA 1:34"  # 65 s of picks, then 17 s and 12 s
        assert task.completed == pytest.approx(38 / 103)
        recorder.record("margin-seed=0", make_result(0))
        assert task.completed == 1.0

"""A whole sweep on real Ray Tune: files, TensorBoard, a failing run, and running the same command again."""

import io
import json
import shutil

import pandas as pd
import pytest
import ray
import yaml
from rich.console import Console
from running import run_in_process, run_on_ray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from fishermask.errors import InputError
from fishermask.planning.placement import this_machine
from fishermask.results import report
from fishermask.results.files import RunFolder
from fishermask.sweeps import run_storage, runner, sweep_file
from fishermask.sweeps.recorder import Recorder

QUIET = Console(quiet=True)
SWEEP = {
    "name": "s",
    "base": {
        "imbalance": {"kind": "balanced", "per_class": 60},
        "model": {"name": "mlp", "params": {"width": 8, "depth": 1}},
        "budget": {"initial": 10, "query": 10, "total": 30},
        "training": {"max_epochs": 3},
        # Two concurrent trials. Each has a bundle for itself and one for each shard.
        "resources": {"cpus": 1, "shards": 2, "workers": "ray", "cpus_per_shard": 0.5},
    },
    # A learning rate so large that training fails: one failing run must not end the sweep.
    "grid": {"strategy": ["bait", "random"], "training.learning_rate": [0.001, 1e30], "seed": [0]},
}


def load(folder, *overrides):
    file = folder / "s.yaml"
    file.write_text(yaml.safe_dump(SWEEP | {"output": str(folder / "results")}))
    return sweep_file.expand(sweep_file.load(file, overrides))


def read_rounds_without_seconds(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in folder.history()]


@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory, ray_session):
    folder = tmp_path_factory.mktemp("sweep")
    sweep = load(folder)
    recorder = run_on_ray(sweep, Console(file=(out := io.StringIO()), soft_wrap=True))
    report.write(sweep.folder)
    return folder, sweep, recorder, out.getvalue()


def find_run(sweep, start):
    return next(run for run in sweep.runs if run.name.startswith(start))


def test_run_folders_have_settings_provenance_and_rounds_and_share_a_pool(finished_sweep):
    _, sweep, *_ = finished_sweep
    run = find_run(sweep, "bait-learning_rate=0.001")
    assert run.folder.config() == run.config
    assert [r["labels"] for r in run.folder.history()] == [10, 20, 30]
    (pool,) = (sweep.folder / "pools").iterdir()  # all runs share it
    assert run.folder.provenance().pool == pool.name
    table = pd.read_csv(pool)
    assert len(table) == 600
    initial = run.folder.history()[0]["initial"]
    assert len(set(initial)) == 10 and set(initial) <= set(table["id"])
    assert yaml.safe_load((sweep.folder / "config.yaml").read_text())["grid"] == SWEEP["grid"]


def test_failing_run_leaves_its_traceback_and_does_not_end_the_sweep(finished_sweep):
    _, sweep, recorder, out = finished_sweep
    failed = find_run(sweep, "random-learning_rate=1e+30")
    assert set(recorder.failed) == {run.name for run in sweep.runs if "1e+30" in run.name}
    assert "lower training.learning_rate" in recorder.failed[failed.name]
    assert "Traceback" in failed.folder.error.read_text()
    assert failed.folder.history() == []
    assert recorder.finished == 2
    assert "restarted" not in out  # because it would fail again


def test_round_that_is_reported_twice_is_written_once(finished_sweep, tmp_path):
    _, first, *_ = finished_sweep
    original = find_run(first, "random-learning_rate=0.001").folder.history()
    sweep = load(tmp_path, "training.learning_rate=0.001", "strategy=random")
    (run,), plans = sweep.runs, runner.plan_sweep(sweep, this_machine(), QUIET)
    run.folder.path.mkdir(parents=True)
    with Recorder([(run, [])], plans, ["strategy"], QUIET) as recorder:
        for result in [*original[:2], original[1], original[0], original[2]]:
            recorder.record(run.name, result)
    assert run.folder.history() == original
    assert (recorder.done, recorder.finished) == (3, 1)


def test_journal_of_a_trial_is_on_the_drivers_disk_and_survives_its_writer(tmp_path, ray_session):
    folder = RunFolder(tmp_path)
    storage = run_storage.start({"a": tmp_path})
    journal = run_storage.StoredJournal(storage, "a")
    journal.append(2, [["x", 1], ["y", 2]])
    journal.append(2, [["z", 3]])
    assert folder.journal.read(2) == [["x", 1], ["y", 2], ["z", 3]]
    ray.kill(storage, no_restart=False)
    journal.append(2, [["u", 4]])
    assert run_storage.StoredJournal(storage, "a").read(2) == [["x", 1], ["y", 2], ["z", 3], ["u", 4]]
    assert ray.get(storage.history.remote("a")) == []
    ray.kill(storage)


def test_table_has_the_finished_rounds(finished_sweep):
    _, sweep, *_ = finished_sweep
    table = pd.read_parquet(sweep.folder / "results.parquet")
    assert sorted(table.groupby("strategy")["labels"].apply(list).to_dict().items()) == [
        ("bait", [10, 20, 30]),
        ("random", [10, 20, 30]),
    ]


def test_tensorboard_has_metrics_by_labels_and_the_hyperparameters(finished_sweep):
    _, sweep, *_ = finished_sweep
    run = find_run(sweep, "bait-learning_rate=0.001")
    events = EventAccumulator(str(run.folder.path)).Reload()
    points = [(e.step, e.value) for e in events.Scalars("metrics/accuracy")]
    assert points == [(r["labels"], pytest.approx(r["accuracy"])) for r in run.folder.history()]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["strategy"].string_value == "bait"
    assert values["training.learning_rate"].number_value == 0.001
    assert values["seed"].number_value == 0
    # TensorBoard shows exactly the runs of the sweep: there are no other event files.
    folders = {path.parent for path in sweep.folder.rglob("events.out.tfevents.*")}
    assert folders == {run.folder.path for run in sweep.runs if run.folder.history()}


def test_same_command_again_computes_only_the_missing_rounds(finished_sweep, tmp_path):
    """The file of one run ends in the middle of a line, one run has not begun, and two runs are finished."""
    folder, first, *_ = finished_sweep
    shutil.copytree(folder / "results", tmp_path / "results")
    sweep = load(tmp_path, "training.learning_rate=0.001", "seed=[0,1]")
    interrupted_run, finished = (
        find_run(sweep, "random-learning_rate=0.001-seed=0"),
        find_run(sweep, "bait-learning_rate=0.001-seed=0"),
    )
    lines = interrupted_run.folder.rounds.read_text().splitlines(keepends=True)
    interrupted_run.folder.rounds.write_text(lines[0] + lines[1][:50])
    before = {path: path.stat().st_mtime_ns for path in finished.folder.path.iterdir()}
    recorder = run_on_ray(sweep, QUIET)
    assert recorder.total == 2 + 3 + 3
    assert {path: path.stat().st_mtime_ns for path in finished.folder.path.iterdir()} == before
    assert interrupted_run.folder.rounds.read_text().startswith(lines[0])
    original = find_run(first, "random-learning_rate=0.001-seed=0")
    assert read_rounds_without_seconds(interrupted_run.folder) == read_rounds_without_seconds(original.folder)
    events = EventAccumulator(str(interrupted_run.folder.path)).Reload()
    assert [e.step for e in events.Scalars("metrics/accuracy")] == [10, 20, 30]
    assert runner.unfinished_runs(sweep) == []


def test_run_in_this_process_gives_the_rounds_of_the_trial(finished_sweep, tmp_path):
    folder, first, *_ = finished_sweep
    sweep = load(tmp_path, "training.learning_rate=0.001", "resources.workers=in_process", "resources.shards=1")
    run_in_process(sweep, QUIET)
    for run in sweep.runs:
        assert read_rounds_without_seconds(run.folder) == read_rounds_without_seconds(find_run(first, run.name).folder)


def test_run_that_requests_more_than_the_cluster_has_is_refused_before_any_starts(tmp_path, ray_session):
    sweep = load(tmp_path, "resources.shards=99")
    with pytest.raises(InputError, match="0.5 CPUs.* for each of 99 shards, but the cluster has 1 node of 4 CPUs"):
        run_on_ray(sweep, QUIET)
    assert not sweep.folder.exists()


def test_rounds_are_json_lines(finished_sweep):
    _, sweep, *_ = finished_sweep
    lines = find_run(sweep, "bait-learning_rate=0.001").folder.rounds.read_text().splitlines()
    first = json.loads(lines[0])
    assert first["ended_by"] == "cap"
    assert len(first["batch"]) == 10
    stages = ["query: embed", "query: information", "query: pick"]
    assert list(first["seconds"]) == ["train", "evaluate", "query", *stages]
    assert sum(first["seconds"][stage] for stage in stages) <= first["seconds"]["query"]

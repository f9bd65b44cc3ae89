"""Sweeps that lose the process of a trial, a node, or the driver give the files of an uninterrupted sweep."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from ray.cluster_utils import Cluster
from rich.console import Console
from running import run_in_process, run_on_ray

from fishermask.results import report
from fishermask.sweeps import runner, sweep_file

QUIET = Console(quiet=True)
SWEEP = {
    "name": "s",
    "base": {
        "imbalance": {"kind": "balanced", "per_class": 60},
        "model": {"name": "mlp", "params": {"width": 8, "depth": 1}},
        # Many rounds, so that a process can be killed between them.
        "budget": {"initial": 10, "query": 2, "total": 70},
        "training": {"max_epochs": 3},
    },
    "grid": {"strategy": ["random", "margin"], "seed": [0]},
}
# Ray notices a lost node after 1.5 s instead of 14 s.
FAST = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 500}
FAST |= {"health_check_failure_threshold": 3}


def load(folder, *overrides):
    folder.mkdir(exist_ok=True)
    file = folder / "s.yaml"
    file.write_text(yaml.safe_dump(SWEEP | {"output": str(folder / "results")}))
    return sweep_file.expand(sweep_file.load(file, overrides))


def start_driver(folder, *overrides, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "fishermask.cli", "sweep", str(folder / "s.yaml"), *overrides],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
    )  # fmt: skip


def wait_until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def has_rounds(run, count=2):
    return run.folder.rounds.exists() and run.folder.rounds.read_text().count("\n") >= count


def read_parents():
    """Return the parent of each process."""
    parent_of = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent_of[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process has ended
    return parent_of


def find_trial_processes(ancestor):
    """Return the processes that run trials of a cluster that ``ancestor`` started, each with its raylet."""
    parent_of, trials = read_parents(), {}
    for process in parent_of:
        chain, ancestor_process = [process], process
        while ancestor_process in parent_of:
            ancestor_process = parent_of[ancestor_process]
            chain.append(ancestor_process)
        try:
            title = Path(f"/proc/{process}/cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if ancestor in chain and re.match(r"ray::ImplicitFunc|ray::trial", title):
            trials[process] = chain[1]
    return trials


def read_table(sweep):
    report.write(sweep.folder)
    frame = pd.read_parquet(sweep.folder / "results.parquet")
    return frame.drop(columns=[name for name in frame.columns if name.startswith("seconds")])


def read_rounds(sweep):
    """Return the records of each run's rounds without times."""
    lines = {run.name: map(json.loads, run.folder.rounds.read_text().splitlines()) for run in sweep.runs}
    return {name: [{k: v for k, v in r.items() if k != "seconds"} for r in records] for name, records in lines.items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The same sweep, computed in this process."""
    sweep = load(tmp_path_factory.mktemp("undisturbed"))
    run_in_process(sweep, QUIET)
    return sweep


def kill_after_two_rounds(run, killed_processes):
    """Kill the process of ``run``, the only running trial, with SIGKILL after its second round."""

    old_processes = find_trial_processes(os.getpid()).keys()  # processes of the previous test that are about to end

    def kill():
        (process,) = wait_until(lambda: find_trial_processes(os.getpid()).keys() - old_processes)
        wait_until(lambda: has_rounds(run))
        os.kill(process, signal.SIGKILL)
        killed_processes.append(process)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_run_resumes_after_its_process_is_killed(tmp_path, uninterrupted, ray_session):
    sweep, out, killed_processes = load(tmp_path, "strategy=margin"), io.StringIO(), []
    thread = kill_after_two_rounds(sweep.runs[0], killed_processes)
    recorder = run_on_ray(sweep, Console(file=out, soft_wrap=True))
    thread.join()
    assert killed_processes
    assert recorder.failed == {}
    assert re.search(
        r"restarted: margin-seed=0: its process was lost \(1/3\); it resumes after \d+ of 31", out.getvalue()
    )
    assert read_rounds(sweep)["margin-seed=0"] == read_rounds(uninterrupted)["margin-seed=0"]
    assert recorder.done == recorder.total == 31


def test_run_that_is_lost_too_often_fails_with_the_reason(tmp_path, ray_session):
    sweep = load(tmp_path, "strategy=margin", "resources.restarts=0")
    thread = kill_after_two_rounds(sweep.runs[0], killed_processes := [])
    recorder = run_on_ray(sweep, QUIET)
    thread.join()
    assert killed_processes
    assert "its process was lost after 0 restarts; raise resources.restarts, " in recorder.failed["margin-seed=0"]
    assert "The actor died unexpectedly" in sweep.runs[0].folder.error.read_text()
    assert len(runner.unfinished_runs(sweep)) == 1


def test_resume_after_driver_kill_gives_identical_rounds(tmp_path, uninterrupted):
    sweep = load(tmp_path)
    driver = start_driver(tmp_path)
    wait_until(lambda: driver.poll() is not None or any(has_rounds(run) for run in sweep.runs))
    driver.kill()
    driver.communicate()
    assert runner.unfinished_runs(sweep)
    second_driver = start_driver(tmp_path)
    _, err = second_driver.communicate(timeout=120)
    assert (second_driver.returncode, err) == (0, "")
    assert read_rounds(sweep) == read_rounds(uninterrupted)
    pd.testing.assert_frame_equal(read_table(sweep), read_table(uninterrupted))


def test_run_resumes_on_another_node_after_its_node_is_lost(tmp_path, uninterrupted):
    """The driver joins a cluster with a head that holds no run and two other nodes."""
    options = {"num_cpus": 0, "include_dashboard": False, "_system_config": FAST}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    driver = None
    try:
        nodes = {}
        for _ in range(2):
            node = cluster.add_node(num_cpus=1)
            nodes[node.all_processes["raylet"][0].process.pid] = node
        cluster.wait_for_nodes()
        sweep = load(tmp_path, "strategy=margin")
        driver = start_driver(tmp_path, "strategy=margin", RAY_ADDRESS=cluster.address)
        wait_until(lambda: driver.poll() is not None or has_rounds(sweep.runs[0]))
        ((process, raylet),) = find_trial_processes(os.getpid()).items()
        os.kill(process, signal.SIGSTOP)  # no round may finish while the node shuts down
        cluster.remove_node(nodes[raylet], allow_graceful=False)
        os.kill(process, signal.SIGKILL)
        out, err = driver.communicate(timeout=120)
        assert (driver.returncode, err) == (0, "")
        assert "restarted: margin-seed=0: its process was lost (1/3)" in out
        assert read_rounds(sweep)["margin-seed=0"] == read_rounds(uninterrupted)["margin-seed=0"]
    finally:
        if driver:
            driver.kill()
        cluster.shutdown()

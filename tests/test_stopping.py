"""Signals, and the loss of a Ray process: one line on stderr, the exit status, and finished rounds are kept."""

import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

SLOW = {
    "name": "slow",
    "base": {
        "imbalance": {"kind": "balanced", "per_class": 30},
        "model": "mlp",
        "budget": {"initial": 10, "query": 1, "total": 300},
        "training": {"max_epochs": 3},
    },
    "grid": {"strategy": ["margin"], "seed": [0]},
}


def start(folder, command):
    """Start a command and wait until its first round is finished."""
    (folder / "slow.yaml").write_text(yaml.safe_dump(SLOW | {"output": str(folder / "out")}))
    process = subprocess.Popen(
        [sys.executable, "-m", "fishermask.cli", command, str(folder / "slow.yaml")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not list(folder.glob("out/*/runs/*/rounds.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_sigterm_ends_a_command_with_one_line_and_status_143(tmp_path, command):
    process = start(tmp_path, command)
    children = psutil.Process(process.pid).children(recursive=True)
    if command == "run":
        assert not psutil.Process(process.pid).net_connections("inet")  # as docs/security.md says
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error.startswith("fishermask: terminated; 0 of 1 runs are finished, and all finished rounds are in ")
    assert error.count("\n") == 1
    assert next(tmp_path.glob("out/*/runs/*/rounds.jsonl")).read_text().count("\n") >= 1
    _, remaining = psutil.wait_procs(children, timeout=10)
    assert not [child for child in remaining if child.status() != psutil.STATUS_ZOMBIE]


# A command whose cluster is simulated by two child processes. If "blocked", it ignores SIGTERM, as a blocking call of
# Ray does.
CLUSTER = """
import signal, subprocess, sys, time
from fishermask.stopping import handle_signals, stop_reason
from fishermask.sweeps import cluster
cluster.REACTION_SECONDS = 3
children = [subprocess.Popen([path, "60"]) for path in sys.argv[2:]]
try:
    with handle_signals():
        monitor = cluster.ClusterMonitor()
        try:
            time.sleep(2)
            if sys.argv[1] == "blocked":
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            print(*[child.pid for child in children], flush=True)
            time.sleep(60)
        finally:
            assert not monitor.stop()
except KeyboardInterrupt as interrupt:
    print(f"fishermask: {stop_reason(interrupt)}; cleaned up", file=sys.stderr)
    sys.exit(stop_reason(interrupt).status)
"""


@pytest.mark.parametrize(
    ("kind", "end"), [("responsive", "cleaned up"), ("blocked", "run the same command again to continue")]
)
def test_loss_of_a_ray_process_ends_the_command_and_kills_the_remaining_processes(tmp_path, kind, end):
    for name in ("gcs_server", "other"):
        shutil.copy(shutil.which("sleep"), tmp_path / name)
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, kind, str(tmp_path / "gcs_server"), str(tmp_path / "other")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    gcs, other_process = (psutil.Process(int(pid)) for pid in process.stdout.readline().split())
    gcs.kill()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert error.startswith("fishermask: gcs_server, a process of Ray on this machine, has ended")
    assert error.endswith(f"{end}\n")
    assert error.count("\n") == 1
    assert not psutil.wait_procs([other_process], timeout=10)[1]


# A command with a long cleanup that imports nothing slow.
CLEANUP = """
import sys, time
from fishermask.stopping import handle_signals, stop_reason
def wait(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)
try:
    with handle_signals():
        try:
            print("working", flush=True)
            wait(60)
        finally:
            print("cleaning", flush=True)
            wait({cleanup})
            print("clean", flush=True)
except KeyboardInterrupt as interrupt:
    print(stop_reason(interrupt), file=sys.stderr)
    sys.exit(stop_reason(interrupt).status)
"""


REPLACED_INTERRUPT = """
import sys, time
from fishermask.stopping import handle_signals, stop_reason
try:
    with handle_signals():
        print("working", flush=True)
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None
except KeyboardInterrupt as interrupt:
    print(stop_reason(interrupt), file=sys.stderr)
    sys.exit(stop_reason(interrupt).status)
"""


def test_stop_reason_survives_a_library_that_replaces_the_exception():
    process = subprocess.Popen(
        [sys.executable, "-c", REPLACED_INTERRUPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "working\n"
    process.terminate()
    assert process.communicate(timeout=30)[1] == "terminated\n"
    assert process.returncode == 143


def send_two_signals(cleanup, first, second, delay):
    """Return status, stdout and stderr of a command that gets two signals, ``delay`` seconds apart."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLEANUP.replace("{cleanup}", str(cleanup))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "working\n"
    process.send_signal(first)
    assert process.stdout.readline() == "cleaning\n"
    time.sleep(delay)
    process.send_signal(second)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [(signal.SIGTERM, signal.SIGTERM, 143), (signal.SIGINT, signal.SIGINT, 130), (signal.SIGINT, signal.SIGTERM, 130)],
)
def test_a_later_signal_ends_the_cleanup_without_a_traceback(first, second, status):
    assert send_two_signals(40, first, second, delay=1.2) == (status, "", "")


def test_a_duplicated_signal_does_not_end_the_cleanup():
    assert send_two_signals(1, signal.SIGINT, signal.SIGINT, delay=0) == (130, "clean\n", "interrupted\n")

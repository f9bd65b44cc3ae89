"""Connect to a Ray cluster, or start one on this machine."""

import atexit
import json
import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from fishermask import stopping
from fishermask.errors import InputError
from fishermask.planning.placement import UNKNOWN_NODE, Bundle, Cluster

# Ray reads these when it is imported. They switch off telemetry, and the TensorBoard files, the progress display, the
# tracebacks and the handling of Ctrl-C of Tune. Trials stay in the working folder: relative paths remain valid.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
if not {"RAY_ADDRESS", "RAY_AUTH_MODE"} & os.environ.keys() and "ray" not in sys.modules:
    # A local cluster listens on this machine's network address and accepts only clients with this token, which is valid
    # for this process only. Without it, Ray would write a token to the home folder.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray  # noqa: E402
from ray.experimental.internal_kv import _internal_kv_get  # noqa: E402

from fishermask.environment import loaded_version  # noqa: E402
from fishermask.sweeps import source_version  # noqa: E402

VITAL = ("gcs_server", "raylet")
"""Names of the processes that a cluster needs."""
CHECK_SECONDS = 0.5
"""Time between two checks of these processes."""
REACTION_SECONDS = 10.0
"""Time for the main thread to react to the loss of the cluster, before the process is ended."""
CONNECTION_TIMEOUT = 10
"""Seconds to wait for a TCP connection to the cluster's address."""
DRIVER_TIMEOUT = 30
"""Seconds to wait until the cluster accepts a driver."""


@contextmanager
def connect(local: Cluster | None = None) -> Iterator[None]:
    """Connect to the cluster at ``RAY_ADDRESS``, or start one on this machine and stop it after the block.

    An existing connection is used and kept. If a vital process of a local cluster ends, the command is stopped.

    Args:
        local: resources of a cluster on this machine; by default those that Ray detects.

    Raises:
        InputError: no cluster answers, or its versions of Python, Ray or fishermask differ from this process's.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address != "local":
        check_address(address)
    resources: dict[str, Any] = {}
    if address == "local" and local is not None:
        # By default Ray reserves a third of the memory for its object store, of which runs use little.
        resources = {"num_cpus": int(local.total("CPU")), "_memory": int(local.total("memory"))}
    try:
        ray.init(
            address=address,
            **resources,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"RAY_ADDRESS: {describe_refusal(address, str(error))}") from None
    except SystemExit:  # raised by the SIGTERM handler that Ray installs while it starts
        raise stopping.Stopped("terminated", stopping.TERMINATED) from None
    stopping.reinstall_handlers()  # Ray has replaced them
    monitor = ClusterMonitor() if address == "local" else None
    try:
        if address != "local":
            source_version.check_nodes(loaded_version())
        yield
    finally:
        if monitor is None or monitor.stop():
            ray.shutdown()


class ClusterMonitor:
    """Monitors the processes of a local cluster in a thread, and stops the command if a vital one ends."""

    def __init__(self) -> None:
        self._processes: set[psutil.Process] = set()
        self._broken = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cluster monitor", daemon=True)
        self._thread.start()

    def stop(self) -> bool:
        """Stop monitoring. Return whether the cluster is intact; kill the remaining processes if it is not."""
        self._stopping.set()
        self._thread.join()
        if self._broken:
            self._kill_processes()
            atexit.register(_exit_now)  # before Ray's own handler, which would wait for the lost processes for a minute
        return not self._broken

    def _run(self) -> None:
        driver = psutil.Process()
        vital = {process: name for process in driver.children() if (name := process.name()) in VITAL}
        while not self._stopping.wait(CHECK_SECONDS):
            self._processes |= set(driver.children(recursive=True))
            ended = [name for process, name in vital.items() if not _is_alive(process)]
            # A signal to the whole process group also ends Ray's processes. Give the main thread time to handle it.
            if not ended or self._stopping.wait(2 * CHECK_SECONDS):
                continue
            self._broken = True
            problem = f"{ended[0]}, a process of Ray on this machine, has ended (was it killed for its memory?)"
            stopping.request_stop(problem)
            if not self._stopping.wait(REACTION_SECONDS):  # a call of Ray may block and ignore the signal
                self._kill_processes()
                advice = "finished rounds are saved; run the same command again to continue"
                print(f"fishermask: {problem}; {advice}", file=sys.stderr)
                _exit_now()
            return

    def _kill_processes(self) -> None:
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()  # safe if the PID is reused: psutil compares the start time


def _exit_now() -> None:
    """End this process without waiting for anything."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(stopping.FAILED)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_address(address: str) -> None:
    """Check within seconds that a cluster answers at ``address``; Ray itself would try for minutes.

    Raises:
        InputError: no Ray cluster answers at the address, or the address is for Ray Client.
    """
    if address.startswith("ray://"):
        raise InputError(
            f"RAY_ADDRESS: {address} is for Ray Client, which cannot write results on this machine; run the command on "
            "a node of the cluster with RAY_ADDRESS=auto, or with ray job submit"
        )
    if match := re.fullmatch(r"([^:/]+):(\d+)", address):
        host, port = match[1], int(match[2])
        is_local = host in ("localhost", "127.0.0.1")  # Ray replaces these by the machine's network address
        try:
            host = ray.util.get_node_ip_address() if is_local else host
            socket.create_connection((host, port), CONNECTION_TIMEOUT).close()
        except OSError as error:
            raise InputError(f"RAY_ADDRESS: nothing answers at {address} ({error}); correct or unset it") from None
    # The process that answers may not be Ray. Ray's own attempt cannot be interrupted, so a subprocess tries first.
    attempt = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='error')"
    command = [sys.executable, "-c", attempt, address]
    try:
        subprocess.run(command, capture_output=True, timeout=DRIVER_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"RAY_ADDRESS: the process at {address} did not accept the driver within {DRIVER_TIMEOUT} s; correct or "
            "unset it"
        ) from None


def describe_refusal(address: str, message: str) -> str:
    """Return, in one line, why Ray did not connect to ``address``; ``message`` is that of Ray's exception."""
    versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", message)
    if "Version mismatch" in message and len(versions) == 2:
        (cluster_ray, cluster_python), (local_ray, local_python) = versions
        return (
            f"the cluster at {address} runs Ray {cluster_ray} on Python {cluster_python}, this command Ray {local_ray} "
            f"on Python {local_python}; install the same versions"
        )
    return f"no Ray cluster answers at {address} ({' '.join(message.split())})"


def connected_cluster() -> Cluster:
    """Return the nodes of the connected cluster with all their resources, and those that an autoscaler may add."""
    nodes = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
    addable_nodes, max_workers = autoscaler_nodes()
    if addable_nodes:
        num_workers = len(nodes) - 1  # all but the head
        return Cluster(nodes, addable_nodes, max(0, max_workers - num_workers))
    return Cluster(nodes, (UNKNOWN_NODE,) if is_autoscaled() else ())


def autoscaler_nodes() -> tuple[tuple[Bundle, ...], int]:
    """Return the nodes that an autoscaler on this machine may start, and the maximum number of worker nodes.

    Both are read from the autoscaler's configuration file. Without an autoscaler, return no nodes and 0.
    """
    for process in psutil.process_iter(["cmdline"]):
        for argument in process.info["cmdline"] or ():
            name, _, value = argument.partition("=")
            if name == "--autoscaling-config" and value:
                return _read_node_types(Path(value).expanduser())
    return (), 0


def _read_node_types(file: Path) -> tuple[tuple[Bundle, ...], int]:
    with suppress(OSError, yaml.YAMLError, AttributeError, TypeError):  # Ray owns the file and may delete it
        config = yaml.safe_load(file.read_text())
        head, max_workers = config.get("head_node_type"), config.get("max_workers", 0)
        types = {name: kind for name, kind in config["available_node_types"].items() if name != head}
        nodes = (
            kind.get("resources", {})
            for kind in types.values()
            for _ in range(min(kind.get("max_workers", max_workers), max_workers))
        )
        return tuple(nodes), max_workers
    return (), 0


def is_autoscaled() -> bool:
    """Return whether an autoscaler may add nodes to the connected cluster."""
    v2_enabled = _internal_kv_get("__autoscaler_v2_enabled", namespace="__autoscaler")
    return reports_autoscaler(_internal_kv_get("__autoscaling_status"), v2_enabled)


def reports_autoscaler(status: bytes | None, v2_enabled: bytes | None) -> bool:
    """Return whether an autoscaler runs, given the status that Ray's monitor stores.

    Args:
        v2_enabled: ``b"1"`` if version 2 of the autoscaler runs, which stores no status here.
    """
    if v2_enabled == b"1":
        return True
    types = json.loads(status or "{}").get("autoscaler_report", {}).get("node_type_mapping") or {}
    # In a cluster without an autoscaler, the monitor invents one type per node.
    return any(kind != f"node_{node}" for node, kind in types.items())

"""Joining a Ray cluster, or starting one on this machine."""

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
from fishermask.planning.placement import Bundle, Cluster

# Read by Ray when it is imported: no telemetry, one TensorBoard tree and one progress display (ours), tracebacks in the
# runs' folders only, paths in a sweep file mean the same in a trial as outside, and Ctrl-C is ours to handle.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
if not {"RAY_ADDRESS", "RAY_AUTH_MODE"} & os.environ.keys() and "ray" not in sys.modules:
    # A cluster of our own listens on this machine's address: it takes commands from holders of this token only, which
    # lives as long as the process. Without it Ray would write one to the home folder.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray  # noqa: E402
from ray.experimental.internal_kv import _internal_kv_get  # noqa: E402

from fishermask.sweeps import source_version  # noqa: E402

VITAL = ("gcs_server", "raylet")
"""Names of the processes without which a cluster is none."""
WATCH_SECONDS = 0.5
REACTION_SECONDS = 10.0
"""Seconds that the main thread has to react when a cluster is lost."""
ANSWER_TIMEOUT = 10
"""Seconds that a machine has to take a connection."""
JOIN_TIMEOUT = 30
"""Seconds that a cluster has to take a driver."""


@contextmanager
def connected(local: Cluster | None = None) -> Iterator[None]:
    """Be connected to a cluster: the one at ``RAY_ADDRESS``, else one of this machine, which ends with the block.

    A connection that is there already is used and kept. If a process that a cluster of this machine cannot do without
    ends, the command is stopped.

    Args:
        local: what a cluster of this machine has; what Ray finds when not given.

    Raises:
        InputError: no cluster answers there, or one with another Python, Ray or fishermask.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address != "local":
        check_address(address)
    sizes: dict[str, Any] = {}
    if address == "local" and local is not None:
        # Of its own accord Ray sets a third of the memory aside for objects, of which a run has few.
        sizes = {"num_cpus": int(local.total("CPU")), "_memory": int(local.total("memory"))}
    try:
        ray.init(
            address=address,
            **sizes,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"RAY_ADDRESS: {why_not(address, str(error))}") from None
    except SystemExit:  # from the handler of SIGTERM that Ray has while it starts
        raise stopping.Stopped("terminated", stopping.TERMINATED) from None
    stopping.handle_again()  # Ray has replaced the handlers by its own
    watch = _Watch() if address == "local" else None
    try:
        if address != "local":
            source_version.check(source_version.installed())
        yield
    finally:
        if watch is None or watch.end():
            ray.shutdown()


class _Watch:
    """Watches the processes of the cluster that this process has started, and stops the command if it loses one."""

    def __init__(self) -> None:
        self.family: set[psutil.Process] = set()
        self.lost = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cluster watch", daemon=True)
        self._thread.start()

    def end(self) -> bool:
        """Stop watching; whether the cluster is whole. What is left of a broken one is killed."""
        self._ending.set()
        self._thread.join()
        if self.lost:
            self._kill()
            atexit.register(_leave)  # before Ray's own, which would wait for a minute for what is gone
        return not self.lost

    def _run(self) -> None:
        me = psutil.Process()
        vital = {process: name for process in me.children() if (name := process.name()) in VITAL}
        while not self._ending.wait(WATCH_SECONDS):
            self.family |= set(me.children(recursive=True))
            gone = [name for process, name in vital.items() if not _alive(process)]
            # A signal to the whole process group ends Ray's processes too, and is to be heard first.
            if not gone or self._ending.wait(2 * WATCH_SECONDS):
                continue
            self.lost = True
            loss = f"{gone[0]}, a process of Ray on this machine, has ended (was it killed for its memory?)"
            stopping.stop(loss)
            if not self._ending.wait(REACTION_SECONDS):  # Ray's calls may wait for what is gone, and hear no signal
                self._kill()
                print(f"fishermask: {loss}; all finished rounds are kept; the same command goes on", file=sys.stderr)
                _leave()
            return

    def _kill(self) -> None:
        for process in self.family:
            with suppress(psutil.NoSuchProcess):
                process.kill()  # this very process: psutil compares the time of its start


def _leave() -> None:
    """End this process without waiting for anything."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(stopping.FAILED)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_address(address: str) -> None:
    """Find out within seconds, where Ray would try for minutes, that no cluster answers at ``address``."""
    if address.startswith("ray://"):
        raise InputError(
            f"RAY_ADDRESS: {address} is for Ray Client, through which no results can be written here; run this on a "
            "node of the cluster with RAY_ADDRESS=auto, or with ray job submit"
        )
    if place := re.fullmatch(r"([^:/]+):(\d+)", address):
        host, port = place[1], int(place[2])
        local = host in ("localhost", "127.0.0.1")  # by which Ray means the address that other nodes know
        try:
            _connect(ray.util.get_node_ip_address() if local else host, port)
        except OSError as error:
            raise InputError(f"RAY_ADDRESS: nothing answers at {address} ({error}); correct or unset it") from None
    # Something listens, perhaps no Ray. Ray's own attempt cannot be interrupted, so another process makes the first.
    attempt = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='error')"
    try:
        subprocess.run([sys.executable, "-c", attempt, address], capture_output=True, timeout=JOIN_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"RAY_ADDRESS: what answers at {address} lets no driver join within {JOIN_TIMEOUT} s; correct or unset it"
        ) from None


def _connect(host: str, port: int) -> None:
    socket.create_connection((host, port), ANSWER_TIMEOUT).close()


def why_not(address: str, message: str) -> str:
    """Ray's reason not to join, in one line."""
    versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", message)
    if "Version mismatch" in message and len(versions) == 2:
        (ray_there, python_there), (ray_here, python_here) = versions
        return (
            f"the cluster at {address} runs Ray {ray_there} on Python {python_there}, this command Ray {ray_here} on "
            f"Python {python_here}; install the same versions"
        )
    return f"no Ray cluster answers at {address} ({' '.join(message.split())})"


def current() -> Cluster:
    """Return the connected cluster's nodes, as if they were idle, and those that its autoscaler may add."""
    nodes = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
    return Cluster(nodes, startable_nodes(), autoscaled())


def startable_nodes() -> tuple[Bundle, ...]:
    """Return the nodes that an autoscaler on this machine may start, as the file says that it was started with."""
    for process in psutil.process_iter(["cmdline"]):
        for argument in process.info["cmdline"] or ():
            name, _, value = argument.partition("=")
            if name == "--autoscaling-config" and value:
                return _node_types(Path(value).expanduser())
    return ()


def _node_types(file: Path) -> tuple[Bundle, ...]:
    with suppress(OSError, yaml.YAMLError, AttributeError, TypeError):  # the file is Ray's, and may go at any time
        config = yaml.safe_load(file.read_text())
        head, most = config.get("head_node_type"), config.get("max_workers", 0)
        types = {name: kind for name, kind in config["available_node_types"].items() if name != head}
        return tuple(
            kind.get("resources", {})
            for kind in types.values()
            for _ in range(min(kind.get("max_workers", most), most))
        )
    return ()


def autoscaled() -> bool:
    """Whether the connected cluster may get nodes that it does not have now."""
    second = _internal_kv_get("__autoscaler_v2_enabled", namespace="__autoscaler")
    return starts_nodes(_internal_kv_get("__autoscaling_status"), second)


def starts_nodes(status: bytes | None, second: bytes | None) -> bool:
    """What Ray's monitor reports, read; ``second``: whether it is the second version, which reports nothing here."""
    if second == b"1":
        return True
    types = json.loads(status or "{}").get("autoscaler_report", {}).get("node_type_mapping") or {}
    # Where nothing can be started, the monitor makes up a type for each node.
    return any(kind != f"node_{node}" for node, kind in types.items())

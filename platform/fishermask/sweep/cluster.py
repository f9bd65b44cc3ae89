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

import psutil

from fishermask import stopping
from fishermask.errors import InputError

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

from fishermask.sweep import package  # noqa: E402

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
def connected() -> Iterator[None]:
    """Be connected to a cluster: the one at ``RAY_ADDRESS``, else one of this machine, which ends with the block.

    A connection that is there already is used and kept. If a process that a cluster of this machine cannot do without
    ends, the command is stopped.

    Raises:
        InputError: no cluster answers there, or one with another Python, Ray or fishermask.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address != "local":
        check_address(address)
    try:
        ray.init(
            address=address,
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
            package.check(package.installed())
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

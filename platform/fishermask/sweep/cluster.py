"""Joining a Ray cluster, or starting one on this machine."""

import json
import logging
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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

ANSWER_TIMEOUT = 10
"""Seconds that a machine has to take a connection."""
JOIN_TIMEOUT = 30
"""Seconds that a cluster has to take a driver."""


@contextmanager
def connected() -> Iterator[None]:
    """Be connected to a cluster: the one at ``RAY_ADDRESS``, else one of this machine, which ends with the block.

    A connection that is there already is used and kept.

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
    try:
        if address != "local":
            package.check(package.installed())
        yield
    finally:
        ray.shutdown()


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

"""Joining a Ray cluster, or starting one on this machine."""

import logging
import os
import re
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fishermask.config import ResourcesConfig
from fishermask.errors import InputError

# Read by Ray when it is imported: no telemetry, one TensorBoard tree and one progress display (ours), paths in a
# sweep file mean the same in a trial as outside, and Ctrl-C is ours to handle.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
if not {"RAY_ADDRESS", "RAY_AUTH_MODE"} & os.environ.keys() and "ray" not in sys.modules:
    # A cluster of our own listens on this machine's address: it takes commands from holders of this token only, which
    # lives as long as the process. Without it Ray would write one to the home folder.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray  # noqa: E402


@contextmanager
def connected() -> Iterator[bool]:
    """Be connected to a cluster: the one at ``RAY_ADDRESS``, else one of this machine, which ends with the block.

    Yields whether the cluster is our own. A connection that is there already is used and kept.
    """
    if ray.is_initialized():
        yield False
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and (place := re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address)):
        try:  # Ray itself tries for minutes before it gives up
            socket.create_connection((place[1], int(place[2])), timeout=10).close()
        except OSError as error:
            raise InputError(f"RAY_ADDRESS: nothing answers at {address} ({error}); correct or unset it") from None
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"RAY_ADDRESS: no Ray cluster answers at {address} ({error})") from None
    try:
        yield address is None
    finally:
        ray.shutdown()


def bundles(resources: ResourcesConfig) -> list[dict[str, float]]:
    """What a run reserves: its own process first, then one bundle a Ray shard."""

    def bundle(cpus: float, gpus: float) -> dict[str, float]:
        return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})

    own = [bundle(resources.cpus, resources.gpus)]
    if resources.workers == "in_process":
        return own
    return own + [bundle(resources.cpus_per_shard, resources.gpus_per_shard)] * resources.shards


def check_resources(resources: ResourcesConfig) -> None:
    """Raise ``InputError`` if a run asks for more than the whole cluster has: it would wait for ever."""
    there = ray.cluster_resources()
    for kind in ("CPU", "GPU"):
        asked = sum(bundle.get(kind, 0) for bundle in bundles(resources))
        if asked > there.get(kind, 0):
            raise InputError(
                f"resources: a run asks for {asked:g} {kind}s in all, but there are {there.get(kind, 0):g}; "
                "lower cpus, gpus, shards or what a shard has"
            )

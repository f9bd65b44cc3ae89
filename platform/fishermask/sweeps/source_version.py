"""Whether the nodes of a cluster have the same fishermask as this process: other code would give other rounds."""

import hashlib
import importlib.util
import os
import sys
from pathlib import Path

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fishermask.errors import InputError

TIMEOUT = 60
"""Seconds that the nodes have to start a process and answer."""


def installed() -> str:
    """The fishermask that this process would import: its version and a hash of its source, strategies included."""
    spec = importlib.util.find_spec("fishermask")
    if spec is None or spec.origin is None:
        return "none"
    from fishermask import __version__  # not at the top: this function is sent to where there may be none

    digest, folder = hashlib.sha256(), Path(spec.origin).parent
    # Links are followed: the strategies may be a folder that is linked into the package.
    places = [(Path(at), sorted(names)) for at, _, names in os.walk(folder, followlinks=True)]
    for path in sorted(place / name for place, names in places for name in names if name.endswith(".py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{__version__} ({digest.hexdigest()[:12]})"


def check(expected: str) -> None:
    """Ask each node that can hold a trial or a shard what is ``installed`` there.

    Raises:
        InputError: one has another fishermask than ``expected``, none, or does not answer.
    """
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)  # a node without fishermask shall be able to say so
    try:
        probe = ray.remote(installed)
        asked = []
        for node in (node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answer = probe.options(num_cpus=0, scheduling_strategy=there).remote()
            asked.append((node["NodeManagerAddress"], answer))
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    for address, answer in asked:
        try:
            found = ray.get(answer, timeout=TIMEOUT)
        except (GetTimeoutError, RayError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(
                f"RAY_ADDRESS: the node {address} does not answer ({reason}); restart or remove it"
            ) from None
        require(expected, found, address)


def require(expected: str, found: str, address: str) -> None:
    """Raise ``InputError`` if what is ``installed`` on the node ``address`` is not what was expected."""
    if found != expected:
        raise InputError(
            f"RAY_ADDRESS: the node {address} has fishermask {found}, this command {expected}; install the same"
        )

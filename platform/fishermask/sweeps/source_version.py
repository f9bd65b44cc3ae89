"""Check that all nodes of a cluster have the same version of fishermask, because other code gives other rounds."""

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fishermask import environment
from fishermask.errors import InputError

TIMEOUT = 60
"""Maximum number of seconds for a node to start a process and answer."""


def check_nodes(expected: str) -> None:
    """Check the version of fishermask on each node that can hold a trial or a shard.

    Args:
        expected: ``installed_version`` of this process.

    Raises:
        InputError: a node has another fishermask or none, or does not answer.
    """
    # Pickle the function by value, so that a node without fishermask can answer.
    cloudpickle.register_pickle_by_value(environment)
    try:
        probe = ray.remote(environment.installed_version)
        answers = []
        for node in (node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")):
            on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answer = probe.options(num_cpus=0, scheduling_strategy=on_node).remote()
            answers.append((node["NodeManagerAddress"], answer))
    finally:
        cloudpickle.unregister_pickle_by_value(environment)
    for address, answer in answers:
        try:
            version = ray.get(answer, timeout=TIMEOUT)
        except (GetTimeoutError, RayError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(
                f"RAY_ADDRESS: the node {address} does not answer ({reason}); restart or remove it"
            ) from None
        require_version(expected, version, address)


def require_version(expected: str, version: str, address: str) -> None:
    """Raise ``InputError`` if the fishermask of the node ``address`` is not the expected one."""
    if version != expected:
        raise InputError(
            f"RAY_ADDRESS: the node {address} has fishermask {version}, this command {expected}; install the same"
        )

"""Clusters that are refused: in one line, within seconds, before anything runs."""

import json
import re
import socket
import subprocess
import sys

import pytest
import ray
from ray import cloudpickle
from ray._private.utils import check_version_info

from fishermask import environment
from fishermask.errors import InputError
from fishermask.sweeps import cluster, source_version


def get_error(function, *args):
    """Return the one-line message of the ``InputError`` that ``function`` raises."""
    with pytest.raises(InputError) as exception_info:
        function(*args)
    message = str(exception_info.value)
    assert "\n" not in message
    return message


def test_an_address_without_a_listener_is_refused():
    for address in ("127.0.0.1:1", "localhost:1", "no-such-host.invalid:6379"):
        assert get_error(cluster.check_address, address).startswith(f"RAY_ADDRESS: nothing answers at {address} (")


def test_ray_client_is_refused_with_the_alternative():
    message = get_error(cluster.check_address, "ray://head:10001")
    assert message.startswith("RAY_ADDRESS: ray://head:10001 is for Ray Client")
    assert "RAY_ADDRESS=auto" in message


def test_a_listener_other_than_ray_is_refused_after_the_timeout(monkeypatch):
    monkeypatch.setattr(cluster, "DRIVER_TIMEOUT", 3)
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert f"the process at {address} did not accept the driver within 3 s" in get_error(
            cluster.check_address, address
        )


def test_a_cluster_with_another_ray_is_refused_with_both_versions():
    """The message comes from Ray, so this test fails if Ray changes its wording."""
    with pytest.raises(RuntimeError) as exception_info:
        check_version_info({"ray_version": "1.2.3", "python_version": "3.9.1"}, "node 10.0.0.1")
    reason = cluster.describe_refusal("10.0.0.1:6379", str(exception_info.value))
    assert reason.startswith("the cluster at 10.0.0.1:6379 runs Ray 1.2.3 on Python 3.9.1, this command Ray ")
    assert f"Ray {ray.__version__} on Python {'.'.join(map(str, sys.version_info[:3]))}; install" in reason


def test_other_messages_of_ray_are_put_on_one_line():
    assert cluster.describe_refusal("auto", "No cluster.\n  1. Start one.") == (
        "no Ray cluster answers at auto (No cluster. 1. Start one.)"
    )


def test_a_node_with_another_fishermask_is_refused_by_address(ray_session):
    local_version = environment.installed_version()
    source_version.check_nodes(local_version)
    node = ray.nodes()[0]["NodeManagerAddress"]
    message = get_error(source_version.check_nodes, "0.0.9 (abcdef)")
    assert message == (
        f"RAY_ADDRESS: the node {node} has fishermask {local_version}, this command 0.0.9 (abcdef); install the same"
    )


def get_version_in_subprocess(preparation):
    """Return what ``installed_version`` returns in a new process, after ``preparation``, as on another node."""
    cloudpickle.register_pickle_by_value(environment)
    pickled_function = cloudpickle.dumps(environment.installed_version)
    cloudpickle.unregister_pickle_by_value(environment)
    code = f"import pickle, sys; {preparation}; print(pickle.loads({pickled_function!r})())"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.stderr == ""
    return process.stdout.strip()


def test_a_node_without_the_package_reports_none():
    assert get_version_in_subprocess("sys.modules['fishermask'] = None") == "none"  # any import of it would fail


def test_source_version_covers_the_version_and_every_source_file(tmp_path):
    (tmp_path / "fishermask/query_strategies").mkdir(parents=True)
    (tmp_path / "fishermask/__init__.py").write_text("__version__ = '7'")
    (tmp_path / "fishermask/notes.txt").write_text("not code")
    versions = []
    for content in ("x = 1", "x = 2", "x = 1"):
        (tmp_path / "fishermask/query_strategies/own.py").write_text(content)
        versions.append(get_version_in_subprocess(f"sys.path.insert(0, {str(tmp_path)!r})"))
    assert all(re.fullmatch(r"7 \([0-9a-f]{12}\)", version) for version in versions)
    assert versions[0] == versions[2] != versions[1]


def test_an_autoscaler_is_distinguished_from_a_plain_monitor():
    """Both statuses are as Ray 2.60 writes them: without an autoscaler, the monitor invents one type per node."""

    def status(types):
        return json.dumps({"autoscaler_report": {"active_nodes": {}, "node_type_mapping": types}}).encode()

    node = "627f79398d12649213d73138a9202c0dad099100544a74e16d464685"
    assert not cluster.reports_autoscaler(status({node: f"node_{node}"}), b"0")
    assert cluster.reports_autoscaler(status({node: "ray.head.default"}), b"0")
    assert not cluster.reports_autoscaler(None, None)
    assert cluster.reports_autoscaler(None, b"1")

"""What a cluster is refused for: each in one line, within seconds, before anything runs."""

import json
import re
import socket
import subprocess
import sys

import pytest
import ray
from ray import cloudpickle
from ray._private.utils import check_version_info

from fishermask.errors import InputError
from fishermask.sweeps import cluster, source_version


def refusal(function, *args):
    with pytest.raises(InputError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_address_where_nothing_listens_is_refused():
    for address in ("127.0.0.1:1", "localhost:1", "no-such-host.invalid:6379"):
        assert refusal(cluster.check_address, address).startswith(f"RAY_ADDRESS: nothing answers at {address} (")


def test_ray_client_is_refused_with_what_to_do_instead():
    message = refusal(cluster.check_address, "ray://head:10001")
    assert message.startswith("RAY_ADDRESS: ray://head:10001 is for Ray Client")
    assert "RAY_ADDRESS=auto" in message


def test_something_else_that_listens_is_refused_in_bounded_time(monkeypatch):
    monkeypatch.setattr(cluster, "JOIN_TIMEOUT", 3)
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert f"what answers at {address} lets no driver join within 3 s" in refusal(cluster.check_address, address)


def test_a_cluster_of_another_ray_is_named_with_both_versions():
    """The text is Ray's own, so that a change of its words is seen here."""
    with pytest.raises(RuntimeError) as caught:
        check_version_info({"ray_version": "1.2.3", "python_version": "3.9.1"}, "node 10.0.0.1")
    reason = cluster.why_not("10.0.0.1:6379", str(caught.value))
    assert reason.startswith("the cluster at 10.0.0.1:6379 runs Ray 1.2.3 on Python 3.9.1, this command Ray ")
    assert f"Ray {ray.__version__} on Python {'.'.join(map(str, sys.version_info[:3]))}; install" in reason


def test_any_other_reason_of_rays_is_put_on_one_line():
    assert cluster.why_not("auto", "No cluster.\n  1. Start one.") == (
        "no Ray cluster answers at auto (No cluster. 1. Start one.)"
    )


def test_nodes_with_the_same_package_pass_and_another_is_named(ray_session):
    own = source_version.installed()
    source_version.check(own)
    node = ray.nodes()[0]["NodeManagerAddress"]
    message = refusal(source_version.check, "0.0.9 (abcdef)")
    assert message == (
        f"RAY_ADDRESS: the node {node} has fishermask {own}, this command 0.0.9 (abcdef); install the same"
    )


def installed_elsewhere(preparation):
    """What ``source_version.installed`` says in a process that is prepared by ``preparation``, as a node is asked."""
    cloudpickle.register_pickle_by_value(source_version)
    sent = cloudpickle.dumps(source_version.installed)
    cloudpickle.unregister_pickle_by_value(source_version)
    code = f"import pickle, sys; {preparation}; print(pickle.loads({sent!r})())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stderr == ""
    return found.stdout.strip()


def test_a_node_without_the_package_can_say_so():
    assert installed_elsewhere("sys.modules['fishermask'] = None") == "none"  # any import of it would fail


def test_a_package_is_known_by_its_version_and_every_source_file(tmp_path):
    (tmp_path / "fishermask/query_strategies").mkdir(parents=True)
    (tmp_path / "fishermask/__init__.py").write_text("__version__ = '7'")
    (tmp_path / "fishermask/notes.txt").write_text("not code")
    found = []
    for content in ("x = 1", "x = 2", "x = 1"):
        (tmp_path / "fishermask/query_strategies/own.py").write_text(content)
        found.append(installed_elsewhere(f"sys.path.insert(0, {str(tmp_path)!r})"))
    assert all(re.fullmatch(r"7 \([0-9a-f]{12}\)", one) for one in found)
    assert found[0] == found[2] != found[1]


def test_an_autoscaler_is_told_from_rays_plain_monitor():
    """Both as Ray 2.60 wrote them: the monitor of a plain cluster makes up a type for each node."""

    def status(types):
        return json.dumps({"autoscaler_report": {"active_nodes": {}, "node_type_mapping": types}}).encode()

    node = "627f79398d12649213d73138a9202c0dad099100544a74e16d464685"
    assert not cluster.starts_nodes(status({node: f"node_{node}"}), b"0")
    assert cluster.starts_nodes(status({node: "ray.head.default"}), b"0")
    assert not cluster.starts_nodes(None, None)
    assert cluster.starts_nodes(None, b"1")

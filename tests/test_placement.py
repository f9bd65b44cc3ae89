"""Resources that runs reserve on a cluster, and refusals of runs that do not fit."""

import itertools
import subprocess
import sys
import threading
import time

import pytest
import ray
import yaml
from rich.console import Console
from running import run_on_ray

from fishermask.config import ResourcesConfig
from fishermask.errors import InputError
from fishermask.experiment.run_plan import plan_run
from fishermask.planning import placement
from fishermask.planning.estimates import Estimate
from fishermask.planning.placement import PROCESS_BYTES, UNKNOWN_NODE, Cluster
from fishermask.planning.query_plan import QueryPlan
from fishermask.sweeps import cluster, runner, sweep_file, tune_runner

QUIET = Console(quiet=True)
GB = 1e9


def make_plan(coordinator=0.0, shard=None, num_shards=1):
    """Return a plan whose coordinator and Ray shards need ``coordinator`` and ``shard`` GB."""

    def estimate(size):
        return None if size is None else Estimate({"embeddings": size * GB}, "embed the pool")

    return QueryPlan(num_shards, 128, 32, 1.0, estimate(coordinator), estimate(shard))


def has_placement(request, nodes):
    """Return whether a placement exists, by trying each bundle on each node."""
    for places in itertools.product(range(len(nodes)), repeat=len(request)):
        free = [dict(node) for node in nodes]
        for bundle, place in zip(request, places, strict=True):
            for kind, amount in bundle.items():
                free[place][kind] = free[place].get(kind, 0) - amount
        if all(amount >= 0 for node in free for amount in node.values()):
            return True
    return False


def test_a_run_is_refused_exactly_when_no_placement_of_its_processes_exists():
    nodes = ({"CPU": 4, "GPU": 1, "memory": 2 * GB}, {"CPU": 2, "GPU": 2, "memory": GB}, {"CPU": 3, "memory": 3 * GB})
    outcomes = set()
    for cpus, gpus, cpus_per_shard, gpus_per_shard, shards, need in itertools.product(
        [0.5, 3], [0, 1], [0.5, 2, 5], [0, 0.5, 1], [1, 3, 4], [(0, 0), (1.5, 0), (0, 1.1)]
    ):
        resources = ResourcesConfig(
            cpus=cpus, gpus=gpus, workers="ray", cpus_per_shard=cpus_per_shard, gpus_per_shard=gpus_per_shard
        )
        request = placement.bundles(resources, make_plan(*need, shards))
        assert len(request) == 1 + shards
        fits = placement.fits(request, nodes)
        assert fits == has_placement(request, nodes), request
        if fits:
            assert placement.check_placement(request, Cluster(nodes)) is None
        else:
            with pytest.raises(InputError, match="but the cluster has 3 nodes"):
                placement.check_placement(request, Cluster(nodes))
        outcomes.add(fits)
    assert outcomes == {True, False}


def test_a_refusal_names_the_request_and_the_nodes():
    request = placement.bundles(ResourcesConfig(gpus=1, workers="ray", cpus_per_shard=0.5), make_plan(1.5, 0.5, 2))
    with pytest.raises(InputError) as caught:
        placement.check_placement(request, Cluster(({"CPU": 2, "memory": 4 * GB},) * 3))
    assert str(caught.value) == (
        "resources: a run needs 1 CPU, 1 GPU, 2.00 GB for the trial and 0.5 CPUs, 1.00 GB for each of 2 shards, but "
        "the cluster has 3 nodes of 2 CPUs, 4.00 GB; lower resources.cpus, gpus, shards or memory, or the mask's "
        "size, or add nodes"
    )


def test_a_run_waits_for_nodes_that_an_autoscaler_can_start_and_is_refused_otherwise():
    request = placement.bundles(ResourcesConfig(gpus=1), make_plan())
    nodes = ({"CPU": 2, "memory": 4 * GB},)
    able, unable = {"CPU": 4, "GPU": 1, "memory": 8 * GB}, {"CPU": 4, "memory": 8 * GB}
    for cluster_ in (Cluster(nodes, (able,)), Cluster(nodes, (UNKNOWN_NODE,))):
        assert "but the cluster has 1 node of" in placement.check_placement(request, cluster_)
    with pytest.raises(InputError, match="but the cluster has"):
        placement.check_placement(request, Cluster(nodes, (unable,)))


def test_each_process_reserves_its_estimate_and_the_memory_of_an_idle_process():
    ray_shards = ResourcesConfig(workers="ray", cpus_per_shard=0.5)
    run, *shards = placement.bundles(ray_shards, make_plan(2.0, 1.0, 3))
    assert run == {"CPU": 1, "GPU": 0, "memory": 2 * GB + PROCESS_BYTES}
    assert shards == [{"CPU": 0.5, "GPU": 0, "memory": GB + PROCESS_BYTES}] * 3
    assert placement.bundles(ResourcesConfig(gpus=1), make_plan()) == [{"CPU": 1, "GPU": 1, "memory": PROCESS_BYTES}]


def test_resources_memory_replaces_the_estimates():
    resources = ResourcesConfig(workers="ray", memory=3)
    for plan in (make_plan(0.1, 0.1), make_plan(20, 30)):
        assert [bundle["memory"] for bundle in placement.bundles(resources, plan)] == [3 * GB, 3 * GB]


def test_all_runs_of_a_sweep_reserve_the_same_memory_if_it_fits():
    resources = ResourcesConfig(cpus=2)
    sweep = {name: placement.bundles(resources, make_plan(need)) for name, need in (("a", 0.0), ("b", 1.5))}
    nodes = ({"CPU": 4, "memory": 4 * GB},)
    assert placement.equal_reservations(sweep, Cluster(nodes)) == {"a": sweep["b"], "b": sweep["b"]}
    assert placement.equal_reservations({}, Cluster(nodes)) == {}
    # Each run fits, but not the largest trial together with the largest shards.
    large, few, many = ({"CPU": 1, "GPU": 0, "memory": size * GB} for size in (40, 0.6, 3.5))
    sweep = {"a": [large, *[few] * 14], "b": [few, *[many] * 14]}
    assert placement.equal_reservations(sweep, Cluster(({"CPU": 16, "memory": 64 * GB},))) == sweep


def sweep_of(folder, **base):
    settings = {
        "imbalance": {"kind": "balanced", "per_class": 30},
        "model": {"name": "mlp", "params": {"width": 8, "depth": 1}},
        "budget": {"initial": 10, "query": 10, "total": 20},
        "training": {"max_epochs": 3},
        # The free memory of the machine that runs this test must not matter.
        "resources": {"memory": 0.6},
        **base,
    }
    file = folder / "s.yaml"
    content = {"name": "s", "base": settings, "grid": {"seed": [0, 1]}, "output": str(folder / "results")}
    file.write_text(yaml.safe_dump(content))
    return sweep_file.expand(sweep_file.load(file))


@pytest.fixture(scope="module")
def small_node():
    """A node with CPUs for four processes, and memory for one of 0.6 GB."""
    sizes = {"num_cpus": 4, "_memory": 0.8 * GB, "object_store_memory": 200 * 10**6}
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="error", **sizes)
    yield
    ray.shutdown()


def test_trials_that_do_not_fit_together_run_one_after_the_other(tmp_path, small_node):
    sweep = sweep_of(tmp_path, strategy="random")
    taken, done = [], threading.Event()

    def watch():
        while not done.is_set():
            taken.append(4 - ray.available_resources().get("CPU", 0))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        recorder = run_on_ray(sweep)
    finally:
        done.set()
        watcher.join()
    assert max(taken) == 1  # a trial has one CPU
    assert (recorder.finished, recorder.failed) == (2, {})


LARGE = {"strategy": "bait", "model": {"name": "mlp", "params": {"width": 600, "depth": 1}}, "resources": {"memory": 3}}


def test_a_run_that_fits_on_no_node_is_refused_before_any_run_starts(tmp_path, small_node):
    sweep, nodes = sweep_of(tmp_path, **LARGE), cluster.connected_cluster()
    with pytest.raises(InputError, match=r"needs 1 CPU, 3.00 GB for the trial, .* 4 CPUs, 800 MB; lower"):
        runner.plan_sweep(sweep, nodes, QUIET)
    plans = runner.plan_sweep(sweep, Cluster(({"CPU": 1, "memory": 4 * GB},)), QUIET)
    with pytest.raises(InputError, match="the cluster has 1 node of 4 CPUs, 800 MB"):
        tune_runner.run_on_ray(sweep, plans, nodes, QUIET)
    assert not sweep.folder.exists()


def test_shards_that_fit_on_no_node_are_refused_even_if_the_run_is_in_this_process(tmp_path, small_node):
    sweep = sweep_of(tmp_path, **LARGE | {"resources": {"memory": 3, "workers": "ray", "shards": 3}})
    with pytest.raises(InputError, match=r"needs 1 CPU, 3.00 GB for each of 3 shards, but .* 800 MB"):
        runner.plan_sweep(sweep, cluster.connected_cluster(), QUIET, in_process=True)
    assert not sweep.folder.exists()


def test_a_query_is_planned_with_the_memory_of_the_nodes(tmp_path):
    run = sweep_of(tmp_path, **LARGE | {"resources": {}}).runs[0]
    with pytest.raises(InputError, match=r"^resources.memory: .* only 500 MB are available "):
        plan_run(run.config, Cluster(({"CPU": 1, "memory": 1 * GB},)))
    assert plan_run(run.config, Cluster(({"CPU": 1, "memory": 10 * GB},))).query.coordinator.total > GB


def test_autoscaler_nodes_come_from_its_configuration_and_its_limit_counts(tmp_path):
    workers = {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 3, "min_workers": 0}
    types = {"head": {"resources": {"CPU": 2}}, "gpu": workers, "cpu": {"resources": {"CPU": 16}}}
    file = tmp_path / "autoscaling.yaml"
    file.write_text(yaml.safe_dump({"head_node_type": "head", "max_workers": 5, "available_node_types": types}))
    assert cluster.autoscaler_nodes() == ((), 0)
    process = subprocess.Popen([sys.executable, "-c", "input()", f"--autoscaling-config={file}"], stdin=subprocess.PIPE)
    try:
        nodes, max_workers = cluster.autoscaler_nodes()
    finally:
        process.communicate(b"\n")
    assert nodes == ({"CPU": 16},) * 5 + ({"CPU": 8, "GPU": 1},) * 3
    scaled = Cluster(({"CPU": 2},), nodes, max_workers)
    assert (scaled.total("CPU"), scaled.total("GPU"), scaled.largest("CPU")) == (2 + 5 * 16, 3, 16)

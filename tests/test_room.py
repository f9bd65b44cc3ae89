"""What a run reserves of a cluster, and that it is not started where it does not fit."""

import itertools
import threading
import time

import pytest
import ray
import yaml
from rich.console import Console

from fishermask.config import ResourcesConfig
from fishermask.errors import InputError
from fishermask.experiment.setup import prepare
from fishermask.pool.plan import Plan
from fishermask.sweep import plan, room, runner, tune_runner
from fishermask.tensors.memory import Estimate

QUIET = Console(quiet=True)
GB = 1e9


def planned(process, shard=0.0):
    """A plan whose process and shards need so many GB."""
    estimate = Estimate({"embeddings": process * GB}, "embeds the pool", 128)
    return Plan(128, 32, estimate, None, 1.0, process * GB, shard * GB)


def placeable(asked, nodes):
    """The oracle: every way to put every bundle on a node."""
    for places in itertools.product(range(len(nodes)), repeat=len(asked)):
        left = [dict(node) for node in nodes]
        for bundle, place in zip(asked, places, strict=True):
            for kind, amount in bundle.items():
                left[place][kind] = left[place].get(kind, 0) - amount
        if all(amount >= 0 for node in left for amount in node.values()):
            return True
    return False


def test_a_run_is_refused_exactly_when_no_placement_of_its_processes_exists():
    sizes = [{"CPU": 4, "GPU": 1, "memory": 2 * GB}, {"CPU": 2, "GPU": 2, "memory": GB}, {"CPU": 3, "memory": 3 * GB}]
    outcomes = set()
    for cpus, gpus, cpus_per_shard, gpus_per_shard, shards, need in itertools.product(
        [0.5, 3], [0, 1], [0.5, 2, 5], [0, 0.5, 1], [1, 3, 4], [(0, 0), (1.5, 0), (0, 1.1)]
    ):
        resources = ResourcesConfig(
            cpus=cpus, gpus=gpus, workers="ray", cpus_per_shard=cpus_per_shard, gpus_per_shard=gpus_per_shard
        )
        asked = room.bundles(resources, shards, planned(*need))
        counted, memory = room.lacking(asked, sizes), room.lacking_memory(asked, sizes)
        assert (counted is None and memory is None) == placeable(asked, sizes), asked
        outcomes.add((counted is None, memory is None))
    assert outcomes == {(True, True), (True, False), (False, False)}  # what lacks CPUs does not fit with memory either


@pytest.mark.parametrize(
    ("settings", "shards", "message"),
    [
        ({"gpus": 9.0}, 1, "resources: a run asks for 9 GPUs in all, but the cluster has 12 CPUs and 8 GPUs"),
        ({"gpus": 8.0}, 1, "resources.gpus: 8 exceeds the 4 GPUs of a node"),
        ({"workers": "ray", "cpus_per_shard": 7.0}, 1, "resources.cpus_per_shard: 7 exceeds the 6 CPUs of a node"),
        ({"cpus": 4.0, "workers": "ray", "cpus_per_shard": 4.0}, 2, "the 3 processes of a run, as large as"),
    ],
)  # fmt: skip
def test_what_a_run_lacks_is_named_with_its_setting(settings, shards, message):
    nodes = [{"CPU": 6.0, "GPU": 4.0, "memory": GB}] * 2
    assert message in room.lacking(room.bundles(ResourcesConfig(**settings), shards), nodes)


def test_each_process_reserves_its_own_need_and_what_a_process_takes_by_itself():
    ray_shards = ResourcesConfig(workers="ray", cpus_per_shard=0.5)
    own, *shards = room.bundles(ray_shards, 3, planned(2.0, 1.0))
    assert own == {"CPU": 1, "memory": 2 * GB + room.PROCESS}
    assert shards == [{"CPU": 0.5, "memory": GB + room.PROCESS}] * 3
    assert room.bundles(ResourcesConfig(gpus=1), 3) == [{"CPU": 1, "GPU": 1, "memory": room.PROCESS}]


def test_a_run_asks_for_less_where_it_fits_only_with_what_ray_sets_aside():
    """A laptop with 4 GB free, as Ray counts it; a query may need up to that, and no more."""
    laptop = [{"CPU": 4.0, "memory": 2.8 * GB, "object_store_memory": 1.2 * GB}]

    def asked(need, shards=0, each=0.0):
        resources = ResourcesConfig(workers="ray", cpus_per_shard=0.5) if shards else ResourcesConfig()
        return room.squeezed(room.bundles(resources, shards, planned(need, each)), laptop)

    assert asked(2.3) == [{"CPU": 1, "memory": 2.8 * GB}]
    assert asked(3.0)[0]["memory"] == pytest.approx(0.7 * 3.5 * GB)
    for fits in (asked(3.6), asked(4.0), asked(0.1, 4, 0.3), asked(0.0, 6)):
        assert room.lacking_memory(fits, laptop) is None
        assert sum(bundle["memory"] for bundle in fits) > 2.8 * GB - room.PROCESS  # so nothing is started beside it
    assert asked(4.1)[0]["memory"] == 4.6 * GB
    assert room.lacking_memory(asked(4.1), laptop) == (
        "resources: a run needs memory, 4.60 GB for its own process, but the largest of 1 nodes has 2.80 GB"
    )
    assert room.lacking_memory(asked(1.0, 4, 1.0), laptop) == (
        "resources: a run needs memory, 1.50 GB for its own process and 1.50 GB for each of 4 shards, "
        "but the largest of 1 nodes has 2.80 GB"
    )


def test_runs_ask_alike_where_memory_keeps_none_waiting():
    resources = ResourcesConfig(cpus=2)
    sweep = {name: room.bundles(resources, 1, planned(need)) for name, need in (("a", 0.0), ("b", 1.5))}
    assert room.alike(sweep, [{"CPU": 4, "memory": 4 * GB}]) == {"a": sweep["b"], "b": sweep["b"]}
    assert room.alike(sweep, [{"CPU": 4, "memory": 4 * GB}, {"CPU": 4, "memory": 3.9 * GB}]) == sweep
    assert room.alike({}, []) == {}
    # Each fits, covered here by a GPU and there by CPUs, but not what is the most of both.
    parts = [{"CPU": 1, "GPU": 1, "memory": 40 * GB}, {"CPU": 1, "memory": 0.6 * GB}, {"CPU": 1, "memory": 3.5 * GB}]
    own, few, many = parts
    sweep = {"a": [own, *[few] * 14], "b": [few, *[many] * 14]}
    assert room.alike(sweep, [{"CPU": 16, "GPU": 1, "memory": 64 * GB}]) == sweep


def sweep_of(folder, **base):
    settings = {
        "imbalance": {"kind": "balanced", "per_class": 30},
        "model": {"name": "mlp", "params": {"width": 8, "depth": 1}},
        "budget": {"initial": 10, "query": 10, "total": 20},
        "training": {"max_epochs": 3},
        # What is free on the machine that runs this test shall not count.
        "resources": {"memory": 1000},
        **base,
    }
    file = folder / "s.yaml"
    content = {"name": "s", "base": settings, "grid": {"seed": [0, 1]}, "output": str(folder / "results")}
    file.write_text(yaml.safe_dump(content))
    return plan.expand(plan.load(file))


@pytest.fixture(scope="module")
def small_node():
    """A node with room for one process of 0.5 GB, which takes four by their CPUs."""
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
        recorder = tune_runner.run_on_ray(sweep, QUIET)
    finally:
        done.set()
        watcher.join()
    assert max(taken) == 1  # a trial has one CPU
    assert (recorder.finished, recorder.failed) == (2, {})


LARGE = {"strategy": "bait", "model": {"name": "mlp", "params": {"width": 600, "depth": 1}}}  # k = 6,010


def test_a_run_that_no_node_has_the_memory_for_is_refused_before_any_starts(tmp_path, small_node):
    sweep = sweep_of(tmp_path, **LARGE)
    need = prepare(sweep.runs[0].config).plan(1).process.total + room.PROCESS
    assert need > 2 * GB
    with pytest.raises(InputError) as caught:
        tune_runner.run_on_ray(sweep, QUIET)
    assert str(caught.value) == (
        f"resources: a run needs memory, {-(-need // room.STEP) / 10:.2f} GB for its own process, but the largest of 1 "
        "nodes has 800 MB; choose a smaller strategy.params.fraction or model, more shards (workers: ray), or larger "
        "nodes"
    )
    assert not sweep.folder.exists()


def test_shards_that_no_node_has_the_memory_for_are_refused_where_the_run_is_in_this_process_too(tmp_path, small_node):
    sweep = sweep_of(tmp_path, **LARGE, resources={"memory": 1000, "workers": "ray", "shards": 3})
    with pytest.raises(InputError, match=r"needs memory, \d\.\d0 GB for each of 3 shards, but .* has 800 MB; choose"):
        runner.run_here(sweep, QUIET)
    assert not sweep.folder.exists()


def test_a_gpu_is_refused_on_a_joined_cluster_that_has_none(small_node):
    with pytest.raises(InputError) as caught:
        room.check([{"CPU": 1, "GPU": 1}])
    assert str(caught.value) == (
        "resources: a run asks for 1 GPUs in all, but the cluster has 4 CPUs and 0 GPUs; "
        "lower it, or the number of shards"
    )

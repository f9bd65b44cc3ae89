"""Lost shards: real actors are killed during a query, and the batch does not change."""

import logging
import os
import signal

import pytest
import ray
import torch
from queries import choose

from fishermask.pool.pool import Engine
from fishermask.pool.ray_shards import RayShards
from fishermask.pool.shards import LocalShards
from fishermask.tensors.precision import Precision


def kill(shards, index):
    """Send SIGKILL to the process of a shard, as the kernel does when memory runs out."""
    pid = ray.get(shards.actors[index].__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(trained):
    setup, model = trained
    return {
        name: choose(name, LocalShards(setup.data.train.images, setup.statistics), setup, model)
        for name in ("fisher_mask", "badge", "margin")
    }


@pytest.mark.parametrize(
    ("name", "stage", "at"),
    [
        ("margin", "predict", 10),
        ("fisher_mask", "embed", 11),
        ("fisher_mask", "information", 0),
        ("fisher_mask", "pick", 9),
        ("badge", "pick", 7),
    ],
)
def test_shard_killed_at_any_stage_gives_the_same_batch(
    name,
    stage,
    at,
    trained,
    undisturbed,
    ray_session,
):
    setup, model = trained
    shards = RayShards(setup.data.train.images, setup.statistics, 2, 1, 0)
    first_actor = shards.actors[0]

    def progress(now, done, total):
        if (now, done) == (stage, at):
            kill(shards, 1)

    assert choose(name, shards, setup, model, progress=progress, close=False) == undisturbed[name]
    assert shards.num_rebuilt == 1
    assert shards.actors[0] is first_actor  # only the lost shard is rebuilt
    shards.close()


def test_shard_killed_while_it_starts_is_rebuilt(trained, undisturbed, ray_session, monkeypatch):
    setup, model = trained
    wait, killed = RayShards._wait_until_started, []

    def wait_for_killed(self, index):
        if not killed:
            killed.append(index)
            kill(self, index)
        wait(self, index)

    monkeypatch.setattr(RayShards, "_wait_until_started", wait_for_killed)
    shards = RayShards(setup.data.train.images, setup.statistics, 2, 1, 0)
    assert choose("margin", shards, setup, model, close=False) == undisturbed["margin"]
    assert shards.num_rebuilt == 1
    shards.close()


def test_two_killed_shards_give_the_same_batch(trained, undisturbed, ray_session):
    setup, model = trained
    shards = RayShards(setup.data.train.images, setup.statistics, 2, 1, 0)

    def progress(stage, done, total):
        if (stage, done) in (("pick", 3), ("pick", 4)):
            kill(shards, done % 2)

    assert choose("fisher_mask", shards, setup, model, progress=progress, close=False) == undisturbed["fisher_mask"]
    assert shards.num_rebuilt == 2
    shards.close()


def test_too_many_lost_shards_raise(
    trained,
    ray_session,
    caplog,
):
    setup, model = trained
    shards = RayShards(setup.data.train.images, setup.statistics, 2, 1, 0, restarts=2)

    def progress(stage, done, total):
        if stage == "embed":
            kill(shards, 1)

    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(
            RuntimeError, match=r"shard 1 was lost after 2 .* raise resources.restarts or .*: The actor died"
        ),
    ):
        choose("bait", shards, setup, model, progress=progress)
    assert len([r for r in caplog.records if "shard 1 was lost; rebuilding it" in r.message]) == 2
    shards.close()


def test_exception_of_a_shard_is_not_retried(trained, ray_session):
    setup, model = trained
    large = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 10), torch.nn.Linear(10, 10))
    with torch.no_grad():
        large[1].weight.mul_(1e8)
    shards = RayShards(setup.data.train.images, setup.statistics, 2, 1, 0)
    with pytest.raises(FloatingPointError, match="float16 cannot hold the embeddings"):
        choose("bait", shards, setup, large, engine=Engine(Precision(storage=torch.float16)))
    assert shards.num_rebuilt == 0
    shards.close()

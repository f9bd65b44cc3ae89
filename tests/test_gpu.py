"""The same code on a GPU. Sums are rounded otherwise there, so batches may differ; how good they are may not."""

import pytest
import torch
from queries import choose

from fishermask.pool.pool import Engine
from fishermask.pool.shards import LocalShards
from fishermask.tensors.precision import Precision

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def objective(name, device, trained, engine=None):
    """What ``tr(M^-1 F)`` is after the batch, and the batch."""
    setup, model = trained
    found = {}
    shards = LocalShards(setup.data.train.images, setup.statistics, 1, device)
    batch = choose(name, shards, setup, model, 30, engine, found.update)
    return found["objective"], batch


@pytest.mark.parametrize("name", ["fisher_mask", "bait"])
def test_the_objective_after_the_batch_is_that_of_the_cpu(name, trained):
    assert objective(name, "cuda", trained)[0] == pytest.approx(objective(name, "cpu", trained)[0], rel=1e-3)


def test_scores_in_float64_choose_the_batch_of_the_cpu(trained):
    engine = Engine(Precision(scores=torch.float64))
    here, there = (set(objective("bait", device, trained, engine)[1]) for device in ("cpu", "cuda"))
    assert len(here & there) >= 28


@pytest.mark.parametrize("name", ["badge", "coreset", "margin", "entropy"])
def test_other_strategies_choose_as_many(name, trained):
    setup, model = trained
    shards = LocalShards(setup.data.train.images, setup.statistics, 1, "cuda")
    assert len(set(choose(name, shards, setup, model, 30))) == 30


def test_a_pick_on_the_gpu_gives_the_same_batch_again(trained):
    assert objective("bait", "cuda", trained) == objective("bait", "cuda", trained)

"""Queries on a GPU. It rounds differently, so batches may differ, but their objectives must agree."""

import pytest
import torch
from queries import choose

from fishermask.pool.pool import Engine
from fishermask.pool.shards import LocalShards
from fishermask.tensors.precision import Precision

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def objective(name, device, trained, engine=None):
    """Return the objective after the query, and the batch."""
    setup, model = trained
    notes = {}
    shards = LocalShards(setup.data.train.images, setup.statistics, 1, device)
    batch = choose(name, shards, setup, model, 30, engine, notes.update)
    return notes["objective"], batch


@pytest.mark.parametrize("name", ["fisher_mask", "bait"])
def test_objective_on_gpu_equals_the_cpu(name, trained):
    assert objective(name, "cuda", trained)[0] == pytest.approx(objective(name, "cpu", trained)[0], rel=1e-3)


def test_float64_scores_on_gpu_give_the_batch_of_the_cpu(trained):
    engine = Engine(Precision(scores=torch.float64))
    on_cpu, on_gpu = (set(objective("bait", device, trained, engine)[1]) for device in ("cpu", "cuda"))
    assert len(on_cpu & on_gpu) >= 28


@pytest.mark.parametrize("name", ["badge", "coreset", "margin", "entropy"])
def test_other_strategies_run_on_gpu(name, trained):
    setup, model = trained
    shards = LocalShards(setup.data.train.images, setup.statistics, 1, "cuda")
    assert len(set(choose(name, shards, setup, model, 30))) == 30


def test_query_on_gpu_is_repeatable(trained):
    assert objective("bait", "cuda", trained) == objective("bait", "cuda", trained)

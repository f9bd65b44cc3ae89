"""Operations never mix tensors of two devices, and the host reads little: tests on a simulated device.

The device computes on the CPU, so results must equal those of the CPU. Rounding on a GPU is tested in ``test_gpu.py``.
"""

import math
from types import SimpleNamespace

import cases
import pytest
import torch
from pretended import THERE, PretendedDevice, PretendedShards, pretending
from test_selection import GRAY, pixels
from torch import Tensor

from fishermask import query_strategies
from fishermask.config import ExperimentConfig, parse
from fishermask.experiment import loop
from fishermask.experiment.inputs import prepare_inputs
from fishermask.experiment.streams import stream
from fishermask.pool import selection
from fishermask.pool.blocks import BLOCK
from fishermask.pool.pool import Engine, Pool, Rescore
from fishermask.pool.shard import to_type
from fishermask.pool.shards import LocalShards
from fishermask.tensors.embedding import dense, embed, information, information_diagonal, product, quadratic, take
from fishermask.tensors.gradient_plan import plan_gradients
from fishermask.tensors.mask import Mask, fisher_diagonal, global_mask
from fishermask.tensors.precision import Precision
from fishermask.tensors.trace import Objective, gains, initial_scores, update_scores


@pytest.fixture(autouse=True)
def _pretending():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors, and rounding that does not depend on how many there are
    with pretending():
        yield
    torch.set_num_threads(threads)


MIXED = {
    "a sum": lambda there, here: there + here,
    "a sum in place": lambda there, here: there.add_(here),
    "a sum in place, into a scalar": lambda there, here: here[0, 0].add_(there),
    "a product": lambda there, here: here @ there,
    "one beside the other": lambda there, here: torch.cat([there, here]),
    "scalars stacked": lambda there, here: torch.stack([there.sum(), here.sum()]),
    "an output": lambda there, here: torch.add(there, there, out=here),
    "an index into the CPU": lambda there, here: here[there.argmax(0)],
    "values put in": lambda there, here: there.index_put_((torch.arange(3),), here),
    "a generator": lambda there, here: torch.rand(3, device=THERE, generator=torch.Generator()),
}
FINE = {
    "a scalar": lambda there, here: there * here.sum(),
    "a scalar put in": lambda there, here: there.index_put_((torch.arange(3),), here.sum()),
    "a copy": lambda there, here: there.copy_(here),
    "a copy of rows": lambda there, here: there[1:].copy_(here[1:]),
    "an index": lambda there, here: there[here.argmax(0)],
}


@pytest.mark.parametrize("name", [*MIXED, *FINE])
def test_the_pretended_device_refuses_what_cuda_refuses(name):
    with PretendedDevice():
        here = torch.arange(9.0).view(3, 3)
        there = here.to(THERE)
        if name in FINE:
            assert FINE[name](there, here).device == THERE
        else:
            with pytest.raises(RuntimeError, match="same device|expected a generator"):
                MIXED[name](there, here)


def test_the_pretended_device_records_reads_of_the_host():
    device = PretendedDevice()
    with device:
        there = torch.arange(3.0, device=THERE)
        there.cpu(), there.tolist(), float(there[1]), bool(there.any()), there.nonzero(), there[there > 0]
        torch.empty(3).copy_(there)
        (there + 1).clone().fill_(2.0)[torch.tensor([0, 1])]
    names = ["_to_copy", "_to_copy", "_local_scalar_dense", "_local_scalar_dense", "nonzero", "index", "copy_"]
    assert [name for name, _ in device.reads] == names


def same(here: Tensor, there: Tensor):
    """Assert that the values are equal, and still on the device."""
    assert there.device == THERE
    torch.testing.assert_close(there.cpu(), here)


# "tied" is left out: Module.to unties what is tied when it cannot change a parameter in place.
@pytest.mark.parametrize("name", ["small_cnn", "convolutions", "tokens", "norms", "mobilenet_v3_small", "vit_b_16"])
@pytest.mark.parametrize("top_classes", [None, 2])
def test_gradients_and_embeddings_stay_on_the_device(name, top_classes):
    model, images = cases.model(name), cases.images(name, 6)
    layout = plan_gradients(model, images[:2])
    diagonal = fisher_diagonal(model, images, layout)
    mask = global_mask(diagonal, layout, 40)
    here = embed(model, images, mask, top_classes=top_classes)
    whole = information(here)
    columns = whole[:, :5].contiguous()
    with PretendedDevice():
        model, images, entries = model.to(THERE), images.to(THERE), {k: v.to(THERE) for k, v in mask.entries.items()}
        for parameter, values in fisher_diagonal(model, images, layout).items():
            same(diagonal[parameter], values)
        there = embed(model, images, Mask(layout, entries), top_classes=top_classes)
        same(whole, information(there))
        same(information_diagonal(here), information_diagonal(there))
        same(dense(here), dense(there))
        same(quadratic(here, whole), quadratic(there, whole.to(THERE)))
        same(product(here, columns), product(there, columns.to(THERE)))


@pytest.mark.parametrize("body_size", [0, 25])
def test_objective_on_the_device_equals_the_cpu(body_size):
    model, images = cases.model("mlp"), cases.images("mlp", 12)
    layout = plan_gradients(model, images[:2])
    here = embed(model, images, global_mask(fisher_diagonal(model, images, layout), layout, body_size))
    whole = information(here)

    def run_objective(embedding, whole):
        objective = Objective(torch.eye(len(whole), device=whole.device, dtype=whole.dtype), whole, 0.5)
        scores = initial_scores(embedding, *objective.matrices())
        for row in range(3):
            update_scores(scores, embedding, objective.add(take(embedding, slice(row, row + 1))))
        objective.remove(take(embedding, slice(1, 2)))
        return gains(scores), *objective.matrices()

    expected = run_objective(here, whole)
    with PretendedDevice():
        for actual, values in zip(
            run_objective(to_type(here, torch.float64, THERE), whole.to(THERE)), expected, strict=True
        ):
            same(values, actual)


def query(name, shards, images, model, budget=8, engine=None, **params):
    """Return the batch, its notes, and the number of reads from a device before each pick."""
    labeled, read = torch.tensor([3, 4, 11, 20]), []

    def progress(stage, done, total):
        if stage == "pick":
            read.append(len(getattr(shards, "reads", [])))

    streams = stream(0, "a"), stream(0, "b")
    pool = Pool(shards, len(images), labeled, torch.zeros(4, dtype=torch.long), model, *streams, progress, engine)
    config = parse(ExperimentConfig, {"strategy": {"name": name, "params": params}}).strategy
    batch = query_strategies.load(config).query(pool, budget).tolist()
    shards.close()
    return batch, pool.notes, read


FISHER = {"fraction": 0.1, "fisher_samples": 64}


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("entropy", {}),
        ("margin", {}),
        ("least_confidence", {}),
        ("badge", {}),
        ("coreset", {}),
        ("bait", {}),
        ("bait", {"top_classes": 2, "oversample": 1.5}),
        ("fisher_mask", FISHER),
        ("fisher_mask", FISHER | {"mask": "layerwise", "top_classes": 2}),
        ("fisher_mask", FISHER | {"mask": "random", "target": "identity"}),
    ],
    ids=str,
)
def test_query_on_the_device_gives_the_batch_of_the_cpu_and_reads_only_candidates(name, params):
    images, model = pixels(BLOCK + 100), cases.model("small_cnn").float()
    here = query(name, LocalShards(images, GRAY, 2), images, model, **params)
    shards = PretendedShards(images, GRAY, 2)
    there = query(name, shards, images, model, **params)
    assert here[:2] == there[:2]
    # A pick's offer, from each shard: gain, position and whether there is any in one copy; the embedding's tensors.
    tensors = 4 + ("top_classes" in params)
    for first, last in zip(there[2], there[2][1:], strict=False):
        offers = shards.reads[first:last]
        assert len(offers) <= 2 * (1 + tensors)
        assert all(read == "_to_copy" and (shape == (3,) or shape[-1] == 1) for read, shape in offers)


@pytest.mark.parametrize(
    "engine",
    [
        Engine(Precision(storage=torch.bfloat16, scores=torch.float64)),
        Engine(Precision(storage=torch.float16, channels_last=True)),
        Engine(drift=0.0),
        Engine(past_picks=[(5, Rescore.SAME_TYPE), (40, Rescore.NONE), (7, Rescore.SAME_TYPE), (99, Rescore.NONE)]),
    ],
    ids=["types", "layout", "rescored", "journal"],
)
@pytest.mark.parametrize("name", ["fisher_mask", "coreset", "badge"])
def test_device_gives_the_batch_of_the_cpu_for_every_engine_setting(name, engine, monkeypatch):
    monkeypatch.setattr(selection, "MIN_RESCORE_INTERVAL", 2)
    images, model = pixels(200), cases.model("small_cnn").float()
    params = FISHER if name == "fisher_mask" else {}
    here = query(name, LocalShards(images, GRAY), images, model, engine=engine, **params)
    assert here[:2] == query(name, PretendedShards(images, GRAY), images, model, engine=engine, **params)[:2]
    assert name != "fisher_mask" or engine.drift or here[1]["rescores"] > 1


@pytest.mark.parametrize("name", ["fisher_mask", "coreset"])
def test_run_on_the_device_gives_the_rounds_of_the_cpu(name, monkeypatch):
    settings = {
        "data": {"augment": True},
        "imbalance": {"kind": "balanced", "per_class": 30},
        "model": {"name": "small_cnn", "params": {"width": 2}},
        "training": {"max_epochs": 3},
        "budget": {"initial": 20, "query": 10, "total": 30},
        "strategy": {"name": name, "params": FISHER | {"fraction": 0.2} if name == "fisher_mask" else {}},
    }

    def rounds(gpus, shards):
        setup = prepare_inputs(parse(ExperimentConfig, settings | {"resources": {"gpus": gpus}}))
        found = [result.as_dict() for result in loop.run(setup, shards)]
        return [{key: value for key, value in result.items() if key != "seconds"} for result in found]

    here = rounds(0, LocalShards)
    device, device_of = PretendedDevice(), {"cuda": THERE, "cpu": torch.device("cpu")}
    monkeypatch.setattr(loop, "torch", SimpleNamespace(**vars(torch) | {"device": device_of.__getitem__}))
    with device:
        there = rounds(1, PretendedShards)
    assert len(here) == 2 and math.isfinite(here[0]["accuracy"])
    assert device.reads  # it was trained there
    assert here == there

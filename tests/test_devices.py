"""Operations never mix tensors of two devices, and the host reads little: tests on a simulated device.

The device computes on the CPU, so results must equal those of the CPU. Rounding on a GPU is tested in ``test_gpu.py``.
"""

import math
from types import SimpleNamespace

import cases
import pytest
import torch
from simulated_device import DEVICE, SimulatedDevice, SimulatedShards, simulate_device
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
def _simulated_device():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # rounding depends on the number of threads
    with simulate_device():
        yield
    torch.set_num_threads(threads)


MIXED = {
    "a sum": lambda on_device, on_cpu: on_device + on_cpu,
    "a sum in place": lambda on_device, on_cpu: on_device.add_(on_cpu),
    "a sum in place, into a scalar": lambda on_device, on_cpu: on_cpu[0, 0].add_(on_device),
    "a product": lambda on_device, on_cpu: on_cpu @ on_device,
    "one beside the other": lambda on_device, on_cpu: torch.cat([on_device, on_cpu]),
    "scalars stacked": lambda on_device, on_cpu: torch.stack([on_device.sum(), on_cpu.sum()]),
    "an output": lambda on_device, on_cpu: torch.add(on_device, on_device, out=on_cpu),
    "an index into the CPU": lambda on_device, on_cpu: on_cpu[on_device.argmax(0)],
    "values put in": lambda on_device, on_cpu: on_device.index_put_((torch.arange(3),), on_cpu),
    "a generator": lambda on_device, on_cpu: torch.rand(3, device=DEVICE, generator=torch.Generator()),
}
FINE = {
    "a scalar": lambda on_device, on_cpu: on_device * on_cpu.sum(),
    "a scalar put in": lambda on_device, on_cpu: on_device.index_put_((torch.arange(3),), on_cpu.sum()),
    "a copy": lambda on_device, on_cpu: on_device.copy_(on_cpu),
    "a copy of rows": lambda on_device, on_cpu: on_device[1:].copy_(on_cpu[1:]),
    "an index": lambda on_device, on_cpu: on_device[on_cpu.argmax(0)],
}


@pytest.mark.parametrize("name", [*MIXED, *FINE])
def test_the_simulated_device_refuses_what_cuda_refuses(name):
    with SimulatedDevice():
        on_cpu = torch.arange(9.0).view(3, 3)
        on_device = on_cpu.to(DEVICE)
        if name in FINE:
            assert FINE[name](on_device, on_cpu).device == DEVICE
        else:
            with pytest.raises(RuntimeError, match="same device|expected a generator"):
                MIXED[name](on_device, on_cpu)


def test_the_simulated_device_records_reads_of_the_host():
    device = SimulatedDevice()
    with device:
        on_device = torch.arange(3.0, device=DEVICE)
        (
            on_device.cpu(),
            on_device.tolist(),
            float(on_device[1]),
            bool(on_device.any()),
            on_device.nonzero(),
            on_device[on_device > 0],
        )
        torch.empty(3).copy_(on_device)
        (on_device + 1).clone().fill_(2.0)[torch.tensor([0, 1])]
    names = ["_to_copy", "_to_copy", "_local_scalar_dense", "_local_scalar_dense", "nonzero", "index", "copy_"]
    assert [name for name, _ in device.reads] == names


def same(on_cpu: Tensor, on_device: Tensor):
    """Assert that the values are equal, and still on the device."""
    assert on_device.device == DEVICE
    torch.testing.assert_close(on_device.cpu(), on_cpu)


# "tied" is left out: Module.to unties what is tied when it cannot change a parameter in place.
@pytest.mark.parametrize("name", ["small_cnn", "convolutions", "tokens", "norms", "mobilenet_v3_small", "vit_b_16"])
@pytest.mark.parametrize("top_classes", [None, 2])
def test_gradients_and_embeddings_stay_on_the_device(name, top_classes):
    model, images = cases.model(name), cases.images(name, 6)
    plan = plan_gradients(model, images[:2])
    diagonal = fisher_diagonal(model, images, plan)
    mask = global_mask(diagonal, plan, 40)
    on_cpu = embed(model, images, mask, top_classes=top_classes)
    whole = information(on_cpu)
    columns = whole[:, :5].contiguous()
    with SimulatedDevice():
        model, images, entries = model.to(DEVICE), images.to(DEVICE), {k: v.to(DEVICE) for k, v in mask.entries.items()}
        for parameter, values in fisher_diagonal(model, images, plan).items():
            same(diagonal[parameter], values)
        on_device = embed(model, images, Mask(plan, entries), top_classes=top_classes)
        same(whole, information(on_device))
        same(information_diagonal(on_cpu), information_diagonal(on_device))
        same(dense(on_cpu), dense(on_device))
        same(quadratic(on_cpu, whole), quadratic(on_device, whole.to(DEVICE)))
        same(product(on_cpu, columns), product(on_device, columns.to(DEVICE)))


@pytest.mark.parametrize("body_size", [0, 25])
def test_objective_on_the_device_equals_the_cpu(body_size):
    model, images = cases.model("mlp"), cases.images("mlp", 12)
    plan = plan_gradients(model, images[:2])
    on_cpu = embed(model, images, global_mask(fisher_diagonal(model, images, plan), plan, body_size))
    whole = information(on_cpu)

    def run_objective(embedding, whole):
        objective = Objective(torch.eye(len(whole), device=whole.device, dtype=whole.dtype), whole, 0.5)
        scores = initial_scores(embedding, *objective.matrices())
        for row in range(3):
            update_scores(scores, embedding, objective.add(take(embedding, slice(row, row + 1))))
        objective.remove(take(embedding, slice(1, 2)))
        return gains(scores), *objective.matrices()

    expected = run_objective(on_cpu, whole)
    with SimulatedDevice():
        for actual, values in zip(
            run_objective(to_type(on_cpu, torch.float64, DEVICE), whole.to(DEVICE)), expected, strict=True
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
    on_cpu = query(name, LocalShards(images, GRAY, 2), images, model, **params)
    shards = SimulatedShards(images, GRAY, 2)
    on_device = query(name, shards, images, model, **params)
    assert on_cpu[:2] == on_device[:2]
    # For each pick, a shard copies its best candidate: three values in one copy, and each tensor of the embedding.
    tensors = 4 + ("top_classes" in params)
    for first, last in zip(on_device[2], on_device[2][1:], strict=False):
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
    on_cpu = query(name, LocalShards(images, GRAY), images, model, engine=engine, **params)
    assert on_cpu[:2] == query(name, SimulatedShards(images, GRAY), images, model, engine=engine, **params)[:2]
    assert name != "fisher_mask" or engine.drift or on_cpu[1]["rescores"] > 1


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

    on_cpu = rounds(0, LocalShards)
    device, device_of = SimulatedDevice(), {"cuda": DEVICE, "cpu": torch.device("cpu")}
    monkeypatch.setattr(loop, "torch", SimpleNamespace(**vars(torch) | {"device": device_of.__getitem__}))
    with device:
        on_device = rounds(1, SimulatedShards)
    assert len(on_cpu) == 2 and math.isfinite(on_cpu[0]["accuracy"])
    assert device.reads  # training ran on the device
    assert on_cpu == on_device

"""What memory estimates count, against the tensors that are alive; and the sample that an approximation costs."""

import pytest
import torch

from fishermask.pool.plan import plan
from fishermask.pool.shard import Shard
from fishermask.tensors import contrasts, models
from fishermask.tensors.approximation import FEWEST_IMAGES, MAX_ROWS, covered_information, row_products, sample_size
from fishermask.tensors.cost import comparison_seconds
from fishermask.tensors.embedding import embed, every_column
from fishermask.tensors.images import Statistics, normalise
from fishermask.tensors.layout import inspect
from fishermask.tensors.mask import body_parameters, fisher_diagonal, global_mask, random_mask
from fishermask.tensors.memory import (
    PREDICTED,
    PredictionProbe,
    Probe,
    diagonal_bytes,
    estimate,
    estimate_prediction,
    live_peak,
    prediction,
    workload,
)
from fishermask.tensors.precision import Precision

STATISTICS = Statistics((0.45, 0.5, 0.55), (0.2, 0.25, 0.3))


def pixels(count, side=32):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def network(name="small_cnn", classes=10, side=32, **params):
    return models.build(name, params, (3, side, side), classes, seed=0).eval()


def setting(model, images, body_size=200, **options):
    """Work, probe and mask of a query on normalised ``images``."""
    work = workload(model, images[:2], inspect(model, images[:2]), body_size, **options)
    body = body_parameters(model, work.layout)
    mask = random_mask(body, work.layout, body_size, torch.Generator().manual_seed(0))
    return work, Probe(model, images[:1], work, mask), mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalized_images_are_the_same_to_the_bit_and_nothing_else_of_their_size_is_held(dtype):
    images = pixels(50)
    mean, std = (torch.tensor(values, dtype=dtype).view(1, 3, 1, 1) for values in STATISTICS)
    assert torch.equal(normalise(images, STATISTICS, dtype), (images.to(dtype) / 255 - mean) / std)
    small = 3 * 3 * 8
    assert live_peak(lambda: normalise(images, STATISTICS, dtype)) <= images.numel() * dtype.itemsize + small


@pytest.mark.parametrize("count", [1, 127, 128, 300])
def test_predictions_in_chunks_are_those_of_single_images(count):
    model, images = network(), pixels(count)
    shard = Shard(images, 0, STATISTICS, "cpu")
    shard.set_model(model, Precision())
    found = shard.probabilities(0, 1)
    expected = torch.cat([model(normalise(image[None], STATISTICS)) for image in images]).softmax(-1)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_prediction_holds_what_is_estimated():
    model, images = network(), pixels(1000)
    shard = Shard(images, 0, STATISTICS, "cpu")
    shard.set_model(model, Precision())
    found = live_peak(lambda: shard.probabilities(0, 1))
    probe = PredictionProbe(model, torch.zeros(1, 3, 32, 32), prediction(model, torch.zeros(1, 3, 32, 32)))
    parts = estimate_prediction(probe, 1000, 1000, 2048).parts
    # The block's bytes are this tensor here, and the model's copy was made before.
    counted = PREDICTED * probe.image + 4 * PREDICTED * 3 * 32 * 32 + parts["probabilities"] / 3
    assert 0.8 * counted <= found <= 1.1 * counted


def test_an_embedded_pool_holds_what_is_estimated():
    model, images = network(), pixels(400)
    work, probe, mask = setting(model, normalise(images[:2], STATISTICS))
    shard = Shard(images, 0, STATISTICS, "cpu")
    shard.set_model(model, Precision())
    found = live_peak(lambda: shard.embed(mask, "sqrt", None, 128, 0, 1))
    types = {"storage": torch.float32, "scores": torch.float32}
    settings = {"block": 2048, "part": 2048, "chunk": 128, **types}
    numbers = work.rows * 200 + work.width + work.kept
    counted = 128 * (probe.chunk + 4 * 3 * 32 * 32 + 4 * numbers) + 512 * 4 * numbers
    assert 0.8 * counted <= found <= 1.1 * counted
    moments = estimate(probe, images=400, leads=False, **settings)
    assert moments.total >= counted


def test_ranking_a_large_models_parameters_is_counted():
    model, images = network("mlp", width=256, depth=1, classes=3), torch.zeros(2, 3, 32, 32)
    parameters = 3 * 32 * 32 * 256 + 256
    work, probe, _ = setting(model, images, ranked=64)
    assert probe.parameters == parameters
    # Sums over a batch do not grow with it: float32 squares and their float64 copy, at least.
    assert diagonal_bytes(model, images[:1], work.layout)[1] >= 12 * parameters
    diagonal = fisher_diagonal(model, torch.randn(2, 3, 32, 32), work.layout)
    found = live_peak(lambda: global_mask(diagonal, work.layout, 200)) + 8 * parameters
    settings = {"block": 2048, "part": 2048, "chunk": 16, "storage": torch.float32, "scores": torch.float32}
    led = estimate(probe, images=10, picks=5, **settings)
    assert led.moment == "orders the parameters"
    assert found <= led.parts["parameters"] <= 2.5 * found
    assert estimate(probe, images=10, leads=False, **settings).total < led.total


def test_each_shard_of_a_process_holds_a_copy_of_the_model():
    model = network("mlp", width=512, depth=1)
    _, probe, _ = setting(model, torch.zeros(2, 3, 32, 32))
    size = sum(4 * p.numel() for p in model.parameters())
    one, three = (plan(probe, 20_000, 5, shards, True, Precision()).process for shards in (1, 3))
    assert (one.parts["model"], three.parts["model"]) == (size, 3 * size)


@pytest.mark.parametrize("top_classes", [None, 3])
@pytest.mark.parametrize("weighting", ["sqrt", "none"])
@pytest.mark.parametrize("body_size", [0, 40])
def test_row_products_are_those_of_the_dense_rows(top_classes, weighting, body_size):
    model, images = network(classes=6, side=8).double(), torch.randn(5, 3, 8, 8).double()
    _, _, mask = setting(model, images, body_size)
    embedding = embed(model, images, mask, weighting, top_classes)
    rows = every_column(embedding).flatten(0, 1)
    assert torch.allclose(row_products(embedding), rows @ rows.mT, rtol=1e-10, atol=1e-14)
    f = rows.mT @ rows / len(images)
    expected = torch.linalg.solve(f + 0.3 * torch.eye(len(f), dtype=f.dtype), f).trace()
    assert covered_information(embedding, 0.3) == pytest.approx(float(expected), rel=1e-9)


def test_the_sample_of_an_approximation_is_bounded():
    for classes in (3, 10, 60, 200):
        count = sample_size(contrasts.count(classes, "sqrt"))
        assert count * (classes - 1) <= MAX_ROWS or count == FEWEST_IMAGES
    assert sample_size(59) == 25


def test_the_error_of_few_classes_is_counted_in_memory_and_time():
    model, images = network(classes=12, side=8, width=4), torch.randn(64, 3, 8, 8)
    work, probe, mask = setting(model, images, 50, top_classes=3)
    sample = images[: work.sampled]

    def compare():
        parts = [embed(model, part, mask) for part in sample.split(16)]
        return covered_information(parts[0], 1.0)

    exact = embed(model, sample, mask)
    solving = live_peak(lambda: covered_information(exact, 1.0))
    # A pool of few images: nothing else is large.
    settings = {"block": 2048, "part": 2048, "chunk": 16, "storage": torch.float32, "scores": torch.float32}
    whole, rough = workload(model, images, work.layout, 50), probe.work
    assert (rough.approximate, whole.approximate) == (True, False)
    products = estimate(probe, images=1, **settings)
    assert products.moment == "measures the approximation"
    assert max(solving, live_peak(compare)) <= products.parts["products"] <= 2 * solving
    assert comparison_seconds(probe) > work.sampled * probe.exact_seconds > 0
    without = plan(Probe(model, images[:1], whole, mask), 100, 1, 1, True, Precision())
    assert without.seconds > 0


def test_labeled_images_cost_a_distance_strategy_time_and_memory():
    model, images = network(), torch.zeros(2, 3, 32, 32)
    work = workload(model, images, inspect(model, images), trace=False)
    probe = Probe(model, images[:1], work)
    few, many = (plan(probe, 10_000, 10, 1, True, Precision(), labeled=labeled) for labeled in (0, 4_990))
    probing = probe.embed_seconds * 10_000
    assert (many.seconds - probing) / (few.seconds - probing) == pytest.approx(500)

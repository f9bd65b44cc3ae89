"""Estimated memory and time against the tensors of real computations; chunks and shards that follow; refusals."""

import math
from dataclasses import replace

import cases
import pytest
import torch
from torch import nn

from fishermask.config import ResourcesConfig
from fishermask.errors import InputError
from fishermask.learning import models
from fishermask.learning.training import fit
from fishermask.planning import estimates, query_plan
from fishermask.planning.estimates import Estimate, QueryRequest, estimate_memory, estimate_seconds
from fishermask.planning.placement import UNKNOWN_NODE, Cluster, container_memory, num_shards
from fishermask.planning.query_plan import format_seconds, plan_query, useful_shards
from fishermask.planning.workload import Cost, Measurement, Workload, measure, measure_cost, peak_bytes
from fishermask.pool.blocks import CHUNKS, PREDICTED
from fishermask.pool.shard import Shard
from fishermask.tensors import contrasts
from fishermask.tensors.approximation import MAX_ROWS, MIN_IMAGES, covered_information, row_products, sample_size
from fishermask.tensors.embedding import embed, every_column
from fishermask.tensors.gradient_plan import plan_gradients
from fishermask.tensors.images import Statistics, normalize
from fishermask.tensors.mask import body_parameters, fisher_diagonal, global_mask, head_size, mask_size, random_mask
from fishermask.tensors.precision import Precision

STATISTICS = Statistics((0.45, 0.5, 0.55), (0.2, 0.25, 0.3))


def pixels(count, side=32):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def network(name="small_cnn", classes=10, side=32, **params):
    return models.build(name, params, (3, side, side), classes, seed=0).eval()


def measurement(model, images, body_size=200, **options):
    """Measure a query of ``model`` that embeds normalized ``images``."""
    return measure(model, images[:1], Workload(plan_gradients(model, images[:2]), body_size, **options), training=False)


def spread_mask(model, images, body_size):
    plan = plan_gradients(model, images[:2])
    return random_mask(body_parameters(model, plan), plan, body_size, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small():
    """The measurement of a query with a small network on 8x8 images."""
    return measurement(cases.model("small_cnn").float(), torch.zeros(2, 1, 8, 8), 30)


def simple_measurement(**changes):
    """Return a measurement with round numbers."""
    fields = {"num_classes": 10, "width": 0, "num_body_parameters": 0, "dtype": torch.float32, "input_bytes": 400}
    fields |= {"work": Workload(), "stored_bytes": 100, "model_bytes": 10**6, "prediction": Cost(1e4, 0, 1e-3)}
    return Measurement(**fields | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalize_equals_the_formula_and_allocates_only_its_result(dtype):
    images = pixels(50)
    mean, std = (torch.tensor(values, dtype=dtype).view(1, 3, 1, 1) for values in STATISTICS)
    assert torch.equal(normalize(images, STATISTICS, dtype), (images.to(dtype) / 255 - mean) / std)
    small = 3 * 3 * 8
    assert peak_bytes(lambda: normalize(images, STATISTICS, dtype)) <= images.numel() * dtype.itemsize + small


def test_peak_bytes_counts_tensors_that_are_alive_at_the_same_time():
    def operation():
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1  # 8,000
        del a
        c = torch.cat([b, b])  # 12,000
        return c.view(2, 1000).mul_(2)[0]  # no more

    assert peak_bytes(operation) == 12_000


def test_cost_separates_bytes_of_each_image_from_fixed_bytes():
    cost = measure_cost(lambda batch: (batch + 1, torch.zeros(50)), torch.zeros(1, 100))
    assert (cost.image_bytes, cost.fixed_bytes) == (400, 200)
    assert cost.image_seconds > 0


def test_measurement_without_seconds_has_the_same_bytes():
    model, images = network(), normalize(pixels(2), STATISTICS)
    work = Workload(plan_gradients(model, images), 200, fisher_samples=100)
    whole = measure(model, images, work)
    bytes_only = measure(model, images, work, seconds=False, verification_bytes=whole.verification_bytes)
    for name in ("prediction", "training", "embedding", "diagonal"):
        whole = replace(whole, **{name: getattr(whole, name)._replace(image_seconds=0.0)})
    assert bytes_only == whole


@pytest.mark.parametrize("count", [1, 127, 128, 300])
def test_predictions_in_chunks_equal_predictions_of_single_images(count):
    model, images = network(), pixels(count)
    shard = Shard(images, 0, STATISTICS, "cpu")
    shard.set_model(model, Precision())
    probabilities = shard.probabilities(0, 1)
    expected = torch.cat([model(normalize(image[None], STATISTICS)) for image in images]).softmax(-1)
    assert probabilities.shape == expected.shape
    assert torch.allclose(probabilities, expected, atol=1e-6)


def test_prediction_memory_matches_a_shard():
    model, images = network(), pixels(1000)
    shard = Shard(images, 0, STATISTICS, "cpu")
    shard.set_model(model, Precision())
    peak = peak_bytes(lambda: shard.probabilities(0, 1))
    measured = measure(model, torch.zeros(1, 3, 32, 32), Workload(), training=False)
    parts = estimate_memory(measured, QueryRequest(1000, 5), 128, 1000).parts
    # The block's bytes are this tensor here, and the model's copy was made before.
    counted = PREDICTED * (measured.prediction.image_bytes + measured.input_bytes) + parts["probabilities"] / 3
    assert 0.8 * counted <= peak <= 1.1 * counted


def test_embedding_memory_matches_a_shard():
    model, images = network(), pixels(400)
    measured = measurement(model, normalize(images[:2], STATISTICS))
    shard = Shard(images, 0, STATISTICS, "cpu")
    shard.set_model(model, Precision())
    mask = spread_mask(model, normalize(images[:2], STATISTICS), 200)
    peak = peak_bytes(lambda: shard.store_embeddings(0, 1, mask, "sqrt", None, 128))
    numbers = 9 * 200 + model.get_submodule(mask.plan.head).in_features + 1 + 10
    assert measured.numbers == numbers
    counted = 128 * (measured.embedding.image_bytes + measured.input_bytes) + 512 * 4 * numbers
    assert 0.8 * counted <= peak <= 1.1 * counted
    assert estimate_memory(measured, QueryRequest(400, 5), 128, 400, coordinates=False).total >= peak


def test_training_memory_matches_a_training_step():
    model, images = network("thin_resnet18"), pixels(200)
    measured = measure(model, torch.zeros(1, 3, 32, 32), None)
    labels = torch.zeros(200, dtype=torch.long)
    settings = {"learning_rate": 1e-3, "batch_size": 100, "target_accuracy": 1.0, "max_epochs": 1, "clip": 0.1}
    peak = peak_bytes(lambda: fit(model, images, labels, STATISTICS, torch.Generator(), **settings, augmentation=None))
    # Only the memory besides the parameters is allocated here.
    parts = estimate_memory(measured, QueryRequest(200, 5, training_batch_size=100), 128, 0, 0).parts
    assert set(parts) == {"model", "labeled images", "gradients", "activations", "libraries"}
    counted = parts["gradients"] + 100 * (measured.training.image_bytes + measured.input_bytes)
    assert counted <= parts["gradients"] + parts["activations"]
    assert 0.8 * peak <= counted <= 1.25 * peak


def test_ranking_memory_matches_the_fisher_diagonal_and_the_sort():
    model = network("mlp", width=256, depth=1, classes=3)
    parameters = 3 * 32 * 32 * 256 + 256
    measured = measurement(model, torch.zeros(2, 3, 32, 32), fisher_samples=64)
    assert measured.num_body_parameters == parameters
    # Sums over a batch do not grow with it: float32 squares and their float64 copy, at least.
    assert measured.diagonal.fixed_bytes >= 12 * parameters
    plan = measured.work.gradient_plan
    diagonal = fisher_diagonal(model, torch.randn(2, 3, 32, 32), plan)
    peak = peak_bytes(lambda: global_mask(diagonal, plan, 200)) + 8 * parameters
    estimate = estimate_memory(measured, QueryRequest(10, 5), 16, 10)
    assert estimate.stage == "rank the parameters"
    assert peak <= estimate.parts["parameters"] + estimate.parts["gradients"] <= 4 * peak
    assert estimate_memory(measured, QueryRequest(10, 5), 16, 10, coordinates=False).total < estimate.total


def test_each_shard_in_a_process_holds_a_copy_of_the_model():
    model = network("mlp", width=512, depth=1)
    measured = measurement(model, torch.zeros(2, 3, 32, 32))
    size = sum(4 * p.numel() for p in model.parameters())
    one, three = (plan_query(measured, QueryRequest(20_000, 5), shards).coordinator for shards in (1, 3))
    assert (one.parts["model"], three.parts["model"]) == (size, 3 * size)


@pytest.mark.parametrize("top_classes", [None, 3])
@pytest.mark.parametrize("weighting", ["sqrt", "none"])
@pytest.mark.parametrize("body_size", [0, 40])
def test_row_products_equal_products_of_dense_rows(top_classes, weighting, body_size):
    model, images = network(classes=6, side=8).double(), torch.randn(5, 3, 8, 8).double()
    embedding = embed(model, images, spread_mask(model, images, body_size), weighting, top_classes)
    rows = every_column(embedding).flatten(0, 1)
    assert torch.allclose(row_products(embedding), rows @ rows.mT, rtol=1e-10, atol=1e-14)
    f = rows.mT @ rows / len(images)
    expected = torch.linalg.solve(f + 0.3 * torch.eye(len(f), dtype=f.dtype), f).trace()
    assert covered_information(embedding, 0.3) == pytest.approx(float(expected), rel=1e-9)


def test_the_sample_of_an_approximation_is_bounded():
    for classes in (3, 10, 60, 200):
        count = sample_size(contrasts.num_rows(classes, "sqrt"))
        assert count * (classes - 1) <= MAX_ROWS or count == MIN_IMAGES
    assert sample_size(59) == 25


def test_top_classes_must_be_smaller_than_the_number_of_classes():
    model, images = network(classes=6, side=8), torch.zeros(2, 3, 8, 8)
    assert measurement(model, images, 0, top_classes=5).rows == 4
    with pytest.raises(InputError, match=r"^strategy.params.top_classes: 6 is not smaller than .* classes, 6; lower"):
        measurement(model, images, 0, top_classes=6)


def test_labeled_images_cost_a_distance_strategy_time_and_memory():
    measured = measurement(network(), torch.zeros(2, 3, 32, 32), 0, trace=False)
    few, many = (plan_query(measured, QueryRequest(10_000, 10, labeled)) for labeled in (0, 4_990))
    embedding = measured.embedding.image_seconds * 10_000
    assert (many.seconds - embedding) / (few.seconds - embedding) == pytest.approx(500)
    requests = [QueryRequest(10_000, 10, labeled) for labeled in (0, 49_900)]
    less, more = (estimate_memory(measured, request, 16, 10_000) for request in requests)
    assert more.total > less.total


def test_a_query_with_oversample_2_takes_as_long_as_twice_the_budget(small):
    def seconds(batch_size, oversample):
        measured = replace(small, work=replace(small.work, oversample=oversample))
        return estimate_seconds(measured, QueryRequest(1000, batch_size), 1000)

    assert seconds(50, 2.0) == seconds(100, 1.0) > seconds(50, 1.0)


def test_the_memory_limit_determines_the_chunk():
    measured = measurement(cases.model("thin_resnet18").float(), torch.zeros(2, 1, 8, 8), 50)
    request = QueryRequest(50_000, 5)
    totals = {chunk: estimate_memory(measured, request, chunk, 50_000).total for chunk in CHUNKS}
    assert len(set(totals.values())) > 1
    for chunk, total in totals.items():
        assert totals[plan_query(measured, request, limit=total).chunk] == total
        assert plan_query(measured, request, limit=total).chunk >= chunk
    half = replace(request, precision=Precision(storage=torch.bfloat16))
    less, more = (estimate_memory(measured, r, 16, 50_000).parts["embeddings"] for r in (half, request))
    assert less < 0.6 * more


@pytest.mark.parametrize("fraction", [None, 0.5])
def test_a_refusal_names_the_largest_mask_that_fits(fraction):
    model, images = cases.model("thin_resnet18").float(), torch.zeros(2, 1, 8, 8)
    measured = measurement(model, images, 900, fraction=fraction)
    request, limit = QueryRequest(5_000, 5), 200e6
    name = "num_body_parameters" if fraction is None else "fraction"
    message = r"^resources.memory: a process needs .*, and only 200 MB are available besides Python and its libraries; "
    with pytest.raises(InputError, match=message + rf"lower strategy.params.{name} to ([\d.]+)$") as caught:
        plan_query(measured, request, limit=limit)
    value = float(str(caught.value).rpartition(" ")[2])
    plan = measured.work.gradient_plan
    size = int(value) if fraction is None else mask_size(model, plan, value) - head_size(model, plan)
    assert 0 < size < 900

    def with_mask(size):
        return replace(measured, work=replace(measured.work, body_size=size))

    plan_query(with_mask(size), request, limit=limit)
    with pytest.raises(InputError):
        plan_query(with_mask(size + 1), request, limit=limit)
    again = plan_query(measurement(model, images, size), request).coordinator.total
    assert 0.9 * limit < again  # the network with this mask was measured again
    with pytest.raises(InputError, match="only 1 MB are available .*; choose a smaller model"):
        plan_query(measured, request, limit=1e6)


def test_a_refusal_names_the_largest_training_batch_that_fits():
    measured = simple_measurement(work=Workload(uses_model=False), training=Cost(1e6, 5e6))
    request = QueryRequest(1000, 10, 90, training_batch_size=1000)
    assert plan_query(measured, request).coordinator.stage == "train"
    with pytest.raises(
        InputError, match=r"^resources.memory: .* to train, .*; lower training.batch_size to (\d+)$"
    ) as e:
        plan_query(measured, request, limit=200e6)
    largest = int(str(e.value).rpartition(" ")[2])
    plan_query(measured, replace(request, training_batch_size=largest), limit=200e6)
    with pytest.raises(InputError):
        plan_query(measured, replace(request, training_batch_size=largest + 1), limit=200e6)
    # Training on a GPU takes no main memory.
    assert plan_query(measured, request, gpu_limit=math.inf).coordinator.total < 1e8


def test_a_refusal_names_the_last_layer_or_a_smaller_storage_type_if_it_fits(small):
    large_ranking = replace(small, num_body_parameters=10**7)
    with pytest.raises(InputError, match="; set strategy.params.mask to last_layer$"):
        plan_query(large_ranking, QueryRequest(1000, 5), limit=200e6)
    last_layer = replace(small, work=replace(small.work, body_size=0))
    limit = plan_query(last_layer, QueryRequest(10**7, 5)).coordinator.total - 100e6
    with pytest.raises(InputError, match="; set engine.storage to bfloat16$"):
        plan_query(last_layer, QueryRequest(10**7, 5), limit=limit)


def test_25000_images_with_the_papers_network_take_less_than_300_mb():
    model, images = models.build("thin_resnet18", {}, (3, 32, 32), 10, seed=0).eval(), torch.zeros(2, 3, 32, 32)
    plan = plan_gradients(model, images)
    measured = measurement(model, images, mask_size(model, plan, 0.002) - head_size(model, plan))
    small, large = (estimate_memory(measured, QueryRequest(n, 0), 16, n).parts for n in (100_000, 125_000))
    assert sum(large[part] - small[part] for part in ("embeddings", "scores")) < 300e6


def test_a_model_without_a_linear_head_is_planned():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    measured = measurement(model, torch.zeros(2, 1, 8, 8), 10)
    assert (measured.width, measured.columns) == (0, 10)
    assert plan_query(measured, QueryRequest(100, 5), 3).chunk == CHUNKS[0]


def test_shards_without_images_need_no_memory(small):
    one, many = (plan_query(small, QueryRequest(1800, 5), shards).coordinator for shards in (1, 9))
    assert many == one


def test_a_prediction_takes_the_activations_of_a_chunk_and_the_probabilities_of_the_pool():
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 500), nn.ReLU(), nn.Linear(500, 10)).requires_grad_(False)
    request = QueryRequest(10_000, 1)
    measured = measure(model, torch.zeros(1, 1, 10, 10), Workload(), training=False)
    assert 4 * (100 + 500) <= measured.prediction.image_bytes <= 4 * (100 + 2 * 500 + 10)
    one = plan_query(measured, request)
    activations = PREDICTED * ((1 + estimates.PREDICTION_GAPS) * measured.prediction.image_bytes + 400)
    parts = one.coordinator.parts
    assert parts["activations"] == activations
    assert parts["images"] == 2048 * 100  # a block of uint8 images
    assert parts["model"] == 4 * (100 * 500 + 500 + 500 * 10 + 10)
    assert parts["probabilities"] == 3 * 4 * 10 * 10_000
    two = plan_query(measured, request, 2)
    assert two.coordinator.parts["activations"] == 2 * activations
    assert two.seconds == pytest.approx(one.seconds * (10_000 - 2 * 2048) / 10_000)  # the other shard has two blocks
    floats = plan_query(replace(measured, stored_bytes=4000), request).coordinator.parts
    assert floats["images"] == floats["activations"] == 2048 * 4000  # two blocks are alive at the same time
    separate = plan_query(measured, request, 2, in_process=False)
    assert (separate.shard.parts["activations"], separate.shard.parts["probabilities"]) == (activations, 0)
    with pytest.raises(InputError, match=r"to predict the pool, .* only 1 MB are available .*; choose a smaller model"):
        plan_query(measured, request, limit=1e6)


def test_shards_on_gpus_take_gpu_memory_and_no_main_memory(small):
    def plan(in_process, gpu_limit):
        return plan_query(small, QueryRequest(50_000, 5), 2, in_process=in_process, gpu_limit=gpu_limit)

    together, separate = plan(True, None), plan(False, None)
    assert together.shard is None
    assert separate.largest_bytes == max(separate.coordinator.total, separate.shard.total)
    assert together.gpu is separate.gpu is None
    assert plan(True, 1e12).gpu == together.coordinator
    assert plan(True, 1e12).coordinator == separate.coordinator
    assert plan(False, 1e12).coordinator == separate.coordinator
    assert plan(False, 1e12).gpu == separate.shard
    assert plan(False, 1e12).shard.total < separate.shard.total
    with pytest.raises(InputError, match="only 10 MB are available"):
        plan(False, 1e7)


def test_more_shards_are_useful_for_more_work_and_less_memory(monkeypatch, small):
    request = QueryRequest(330, 5)
    seconds = plan_query(small, request).seconds

    def shards(seconds_per_shard, in_process=True, limit=math.inf):
        monkeypatch.setattr(query_plan, "SHARD_SECONDS", seconds_per_shard)
        return useful_shards(small, request, in_process=in_process, limit=limit)

    for module in ("planning.query_plan", "planning.estimates", "pool.blocks"):
        monkeypatch.setattr(f"fishermask.{module}.BLOCK", 10)
    assert shards(1e9) == 1
    assert shards(seconds / 7.5) == 8
    assert shards(seconds / 1000) == 33  # one block each; more would be empty
    limit = 0.999 * estimate_memory(small, request, CHUNKS[-1], 330, coordinates=False).total
    assert shards(1e9, in_process=False, limit=limit) > 1
    assert shards(seconds / 7.5, in_process=True, limit=limit) == 1  # they share the memory of one process
    unused = simple_measurement(work=Workload(uses_model=False))
    assert useful_shards(unused, QueryRequest(50_000, 5), in_process=True, limit=math.inf) == 3


@pytest.mark.parametrize(
    ("settings", "useful", "cpus", "gpus", "shards"),
    [
        ({}, 50, 64, 0, 1),
        ({"shards": 7}, 1, 4, 0, 7),
        ({"shards": "auto"}, 1, 64, 0, 1),
        ({"shards": "auto", "cpus": 6.0}, 9, 0, 0, 6),
        ({"shards": "auto", "cpus": 6.0}, 4, 0, 0, 4),
        ({"shards": "auto", "cpus": 0.5}, 9, 0, 0, 1),
        ({"shards": "auto", "workers": "ray"}, 2, 64, 0, 2),
        ({"shards": "auto", "workers": "ray"}, 50, 64, 0, 50),
        ({"shards": "auto", "workers": "ray"}, 50, 8, 0, 7),
        ({"shards": "auto", "workers": "ray", "cpus": 0.7, "cpus_per_shard": 0.1}, 50, 1, 0, 3),
        ({"shards": "auto", "workers": "ray", "gpus": 1.0, "gpus_per_shard": 0.5}, 50, 64, 4, 6),
        ({"shards": "auto", "workers": "ray"}, 50, 0, 0, 1),
    ],
)
def test_automatic_shards_are_the_useful_number_that_fits_on_the_cluster(settings, useful, cpus, gpus, shards):
    assert num_shards(ResourcesConfig(**settings), useful, Cluster(({"CPU": cpus, "GPU": gpus},))) == shards


def test_automatic_shards_count_the_nodes_that_an_autoscaler_can_start():
    resources = ResourcesConfig(shards="auto", workers="ray")
    head = ({"CPU": 2.0},)
    assert num_shards(resources, 50, Cluster(head)) == 1
    assert num_shards(resources, 50, Cluster(head, ({"CPU": 8.0},) * 3)) == 25
    assert num_shards(resources, 50, Cluster(head, (UNKNOWN_NODE,))) == 50


def test_reclaimable_page_cache_is_free_memory(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 200\nfile 700\ninactive_file 600\n")
    assert container_memory(tmp_path) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert container_memory(tmp_path) == math.inf
    assert container_memory(tmp_path / "none") == math.inf  # macOS, and Linux without control groups


def test_a_plan_is_one_line():
    measured, request = simple_measurement(), QueryRequest(100_000, 5)
    text = "peak memory 22 MB (model 1, activations 2, probabilities 12, libraries 7) beyond Python's 0.5 GB"
    assert str(plan_query(measured, request)) == f"about 2 min per query, {text}, 1 shard"
    separate = str(plan_query(measured, request, 2, in_process=False))
    assert separate.startswith("about 51 s per query, peak memory ")
    assert ", 2 shards of 9 MB (model 1, activations 2, libraries 5), each beyond Python's 0.5 GB" in separate
    assert ", GPU memory 22 MB (" in str(plan_query(measured, request, gpu_limit=1e9))
    unused = simple_measurement(work=Workload(uses_model=False))
    assert str(plan_query(unused, QueryRequest(10, 5))).startswith("no computation per query, peak memory 6 MB (")
    assert str(Estimate({"a": 1.2e9, "b": 4e7, "c": 1e6}, "train")) == "1.24 GB (a 1.20, b 0.04)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0312, "0.03 s"), (0.96, "1 s"), (7.4, "7 s"), (89, "89 s"), (95, "2 min"), (5000, "83 min"), (9000, "2.5 h")],
)
def test_seconds_are_formatted_with_a_suitable_unit(seconds, text):
    assert format_seconds(seconds) == text

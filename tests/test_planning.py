"""Estimated memory against the tensors that are alive, chunks and shards that follow from it, and what is refused."""

import dataclasses
import math

import cases
import pytest
import torch
from torch import nn

from fishermask.config import ResourcesConfig
from fishermask.errors import InputError
from fishermask.learning import models
from fishermask.learning.training import fit
from fishermask.planning import query_plan
from fishermask.planning.duration import comparison_seconds, query_seconds
from fishermask.planning.measurement import Measurement, diagonal_bytes, measure, peak_bytes
from fishermask.planning.memory import PREDICTION_GAPS, TRAINING_GAPS, Task, estimate_memory, image_bytes
from fishermask.planning.placement import Cluster, num_shards
from fishermask.planning.query_plan import container_memory, format_seconds, plan_query, wanted_shards
from fishermask.planning.workload import Workload, embedding_workload, prediction_workload
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
    """Measure a query on normalized ``images``; also return its mask."""
    layout = plan_gradients(model, images[:2])
    work = embedding_workload(model, images[:2], layout, body_size, **options)
    body = body_parameters(model, layout)
    mask = random_mask(body, layout, body_size, torch.Generator().manual_seed(0))
    return measure(model, images[:1], work, mask), mask


def small_measurement():
    """Measure a query of a small network on 8x8 images."""
    return measurement(cases.model("small_cnn").float(), torch.zeros(2, 1, 8, 8), 30)[0]


def simple_measurement(**changes):
    """A measurement of round numbers, for arithmetic that can be checked by hand."""
    fields = {"work": Workload(10), "model_bytes": 1e6, "prediction_bytes": 1e4, "prediction_seconds": 1e-3}
    return Measurement(base=torch.float32, image_numbers=100, **fields | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalized_images_are_the_same_to_the_bit_and_nothing_else_of_their_size_is_held(dtype):
    images = pixels(50)
    mean, std = (torch.tensor(values, dtype=dtype).view(1, 3, 1, 1) for values in STATISTICS)
    assert torch.equal(normalize(images, STATISTICS, dtype), (images.to(dtype) / 255 - mean) / std)
    small = 3 * 3 * 8
    assert peak_bytes(lambda: normalize(images, STATISTICS, dtype)) <= images.numel() * dtype.itemsize + small


def test_bytes_are_counted_when_most_tensors_are_alive():
    def work():
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1  # 8,000
        del a
        c = torch.cat([b, b])  # 12,000
        return c.view(2, 1000).mul_(2)[0]  # no more

    assert peak_bytes(work) == 12_000


@pytest.mark.parametrize("count", [1, 127, 128, 300])
def test_predictions_in_chunks_are_those_of_single_images(count):
    model, images = network(), pixels(count)
    shard = Shard(images, 0, STATISTICS, "cpu")
    shard.set_model(model, Precision())
    probabilities = shard.probabilities(0, 1)
    expected = torch.cat([model(normalize(image[None], STATISTICS)) for image in images]).softmax(-1)
    assert probabilities.shape == expected.shape
    assert torch.allclose(probabilities, expected, atol=1e-6)


def test_a_prediction_holds_what_is_estimated():
    model, images = network(), pixels(1000)
    shard = Shard(images, 0, STATISTICS, "cpu")
    shard.set_model(model, Precision())
    peak = peak_bytes(lambda: shard.probabilities(0, 1))
    example = torch.zeros(1, 3, 32, 32)
    measured = measure(model, example, prediction_workload(model, example))
    parts = estimate_memory(measured, Task(1000, 5), 128, 1000).parts
    # The block's bytes are this tensor here, and the model's copy was made before.
    counted = PREDICTED * measured.prediction_bytes + 4 * PREDICTED * 3 * 32 * 32 + parts["probabilities"] / 3
    assert 0.8 * counted <= peak <= 1.1 * counted


def test_an_embedded_pool_holds_what_is_estimated():
    model, images = network(), pixels(400)
    measured, mask = measurement(model, normalize(images[:2], STATISTICS))
    shard = Shard(images, 0, STATISTICS, "cpu")
    shard.set_model(model, Precision())
    peak = peak_bytes(lambda: shard.store_embeddings(0, 1, mask, "sqrt", None, 128))
    numbers = measured.work.rows * 200 + measured.work.width + measured.work.top_classes
    counted = 128 * (measured.embed_bytes + 4 * 3 * 32 * 32 + 4 * numbers) + 512 * 4 * numbers
    assert 0.8 * counted <= peak <= 1.1 * counted
    assert estimate_memory(measured, Task(400, 5), 128, 400, coordinates=False).total >= counted


def test_a_training_step_holds_what_is_estimated():
    model, images = network("thin_resnet18"), pixels(200)
    measured = measure(model, torch.zeros(1, 3, 32, 32), None, training=True)
    labels = torch.zeros(200, dtype=torch.long)
    settings = {"learning_rate": 1e-3, "batch_size": 100, "target_accuracy": 1.0, "max_epochs": 1, "clip": 0.1}

    def train():
        fit(model, images, labels, STATISTICS, torch.Generator(), **settings, augmentation=None)

    peak = peak_bytes(train)
    # Only what the model needs besides its parameters is created here.
    parts = estimate_memory(measured, Task(200, 5, training_batch=100), 128, 0, 0).parts
    assert set(parts) == {"model", "labeled images", "gradients", "activations", "libraries"}
    assert 0.8 * peak <= parts["gradients"] + parts["activations"] / TRAINING_GAPS <= 1.25 * peak


def test_a_larger_training_batch_needs_more_memory_and_the_largest_that_fits_is_named():
    measured = simple_measurement(work=None, training_bytes=1e6, training_fixed_bytes=5e6)
    task = Task(1000, 10, 90, training_batch=1000)
    assert plan_query(measured, task).coordinator.stage == "train"
    with pytest.raises(
        InputError, match=r"^resources.memory: .* to train needs .*; lower training.batch_size to (\d+)$"
    ) as caught:
        plan_query(measured, task, limit=200e6)
    largest = int(str(caught.value).rpartition(" ")[2])
    fits = dataclasses.replace(task, training_batch=largest)
    assert plan_query(measured, fits).coordinator.total <= 200e6
    more = dataclasses.replace(task, training_batch=largest + 1)
    assert plan_query(measured, more).coordinator.total > 200e6
    # On a GPU it takes no main memory.
    assert plan_query(measured, task, gpu=True).main_bytes < 1e8


def test_ranking_a_large_models_parameters_is_counted():
    model, images = network("mlp", width=256, depth=1, classes=3), torch.zeros(2, 3, 32, 32)
    parameters = 3 * 32 * 32 * 256 + 256
    measured, _ = measurement(model, images, fisher_samples=64)
    layout = measured.work.layout
    assert measured.num_body_parameters == parameters
    # Sums over a batch do not grow with it: float32 squares and their float64 copy, at least.
    assert diagonal_bytes(model, images[:1], layout)[1] >= 12 * parameters
    diagonal = fisher_diagonal(model, torch.randn(2, 3, 32, 32), layout)
    peak = peak_bytes(lambda: global_mask(diagonal, layout, 200)) + 8 * parameters
    led = estimate_memory(measured, Task(10, 5), 16, 10)
    assert led.stage == "order the parameters"
    assert peak <= led.parts["parameters"] <= 2.5 * peak
    assert estimate_memory(measured, Task(10, 5), 16, 10, coordinates=False).total < led.total


def test_each_shard_of_a_process_holds_a_copy_of_the_model():
    model = network("mlp", width=512, depth=1)
    measured, _ = measurement(model, torch.zeros(2, 3, 32, 32))
    size = sum(4 * p.numel() for p in model.parameters())
    one, three = (plan_query(measured, Task(20_000, 5), shards).coordinator for shards in (1, 3))
    assert (one.parts["model"], three.parts["model"]) == (size, 3 * size)


@pytest.mark.parametrize("top_classes", [None, 3])
@pytest.mark.parametrize("weighting", ["sqrt", "none"])
@pytest.mark.parametrize("body_size", [0, 40])
def test_row_products_are_those_of_the_dense_rows(top_classes, weighting, body_size):
    model, images = network(classes=6, side=8).double(), torch.randn(5, 3, 8, 8).double()
    _, mask = measurement(model, images, body_size)
    embedding = embed(model, images, mask, weighting, top_classes)
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


def test_the_error_of_few_classes_is_counted_in_memory_and_time():
    model, images = network(classes=12, side=8, width=4), torch.randn(64, 3, 8, 8)
    measured, mask = measurement(model, images, 50, top_classes=3)
    work = measured.work
    sample = images[: work.error_samples]

    def compare():
        parts = [embed(model, part, mask) for part in sample.split(16)]
        return covered_information(parts[0], 1.0)

    exact = embed(model, sample, mask)
    solving = peak_bytes(lambda: covered_information(exact, 1.0))
    whole = embedding_workload(model, images, work.layout, 50)
    assert (work.error_samples > 0, whole.error_samples) == (True, 0)
    # A pool of few images: nothing else is large.
    estimate = estimate_memory(measured, Task(1, 0), 16, 1)
    assert estimate.stage == "measure the approximation"
    assert max(solving, peak_bytes(compare)) <= estimate.parts["products"] <= 2 * solving
    assert comparison_seconds(measured, work) > work.error_samples * measured.exact_seconds > 0


def test_labeled_images_cost_a_distance_strategy_time_and_memory():
    measured, _ = measurement(network(), torch.zeros(2, 3, 32, 32), 0, trace=False)
    few, many = (plan_query(measured, Task(10_000, 10, labeled)) for labeled in (0, 4_990))
    embedding = measured.embed_seconds * 10_000
    assert (many.seconds - embedding) / (few.seconds - embedding) == pytest.approx(500)
    tasks = [Task(10_000, 10, labeled) for labeled in (0, 49_900)]
    less, more = (estimate_memory(measured, task, 16, 10_000) for task in tasks)
    assert more.total > less.total


def test_a_query_that_picks_twice_as_many_images_takes_as_long_as_one_of_twice_the_budget():
    def seconds(query, oversample):
        layout = plan_gradients(cases.model("small_cnn").float(), torch.zeros(2, 1, 8, 8))
        work = Workload(4, layout, 30, 4, 9, trace=True, oversample=oversample)
        return query_seconds(simple_measurement(work=work), 1000, 1000, query)

    assert seconds(50, 2.0) == seconds(100, 1.0) > seconds(50, 1.0)


def test_memory_decides_the_chunk():
    measured, _ = measurement(cases.model("thin_resnet18").float(), torch.zeros(2, 1, 8, 8), 50)
    task = Task(50_000, 5)
    needs = {chunk: estimate_memory(measured, task, chunk, 50_000).total for chunk in CHUNKS}
    assert len(set(needs.values())) > 1
    for chunk, need in needs.items():
        assert needs[plan_query(measured, task, limit=need).chunk] == need
        assert plan_query(measured, task, limit=need).chunk >= chunk
    half = dataclasses.replace(task, precision=Precision(storage=torch.bfloat16))
    less, more = (estimate_memory(measured, each, 16, 50_000).parts["embeddings"] for each in (half, task))
    assert less < 0.6 * more


def test_a_query_that_cannot_fit_is_refused_with_the_largest_mask_that_can():
    model, images = cases.model("thin_resnet18").float(), torch.zeros(2, 1, 8, 8)
    measured, _ = measurement(model, images, 900)
    task, limit = Task(5_000, 5), 200e6
    assert plan_query(measured, task).coordinator.total > limit
    message = r"^resources.memory: the process that is to .* needs .*, more than the 200 MB available; "
    with pytest.raises(InputError, match=message + r"lower strategy.params.num_body_parameters to ([\d,]+)$") as caught:
        plan_query(measured, task, limit=limit)
    largest = int(str(caught.value).rpartition(" ")[2].replace(",", ""))
    assert 0 < largest < 900
    again, _ = measurement(model, images, largest)
    assert plan_query(again, task).coordinator.total > 0.9 * limit
    assert plan_query(again, task, limit=1.02 * limit).chunk in CHUNKS  # it was measured anew
    with pytest.raises(InputError, match=message.replace("200", "1") + "set engine.storage"):
        plan_query(measured, task, limit=1e6)


def test_25000_images_of_the_papers_network_take_less_than_300_mb():
    model, images = models.build("thin_resnet18", {}, (3, 32, 32), 10, seed=0).eval(), torch.zeros(2, 3, 32, 32)
    layout = plan_gradients(model, images)
    work = embedding_workload(model, images, layout, mask_size(model, layout, 0.002) - head_size(model, layout))
    assert 25_000 * sum(image_bytes(work, Precision(), torch.float32)) < 300e6


def test_a_model_without_a_linear_head_is_planned_for_too():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    measured, _ = measurement(model, torch.zeros(2, 1, 8, 8), 10)
    assert (measured.work.width, measured.work.columns) == (0, 10)
    assert plan_query(measured, Task(100, 5), 3).chunk == CHUNKS[0]


def test_shards_without_images_need_no_memory():
    measured = small_measurement()
    one, many = (plan_query(measured, Task(1800, 5), shards).coordinator for shards in (1, 9))
    assert many == one


def test_a_prediction_takes_the_activations_of_a_block_and_the_probabilities_of_all():
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 500), nn.ReLU(), nn.Linear(500, 10)).requires_grad_(False)
    image, task = torch.zeros(1, 1, 10, 10), Task(10_000, 1)
    measured = measure(model, image, prediction_workload(model, image))
    assert 4 * (100 + 500) <= measured.prediction_bytes <= 4 * (100 + 2 * 500 + 10)
    one = plan_query(measured, task)
    activations = PREDICTION_GAPS * PREDICTED * measured.prediction_bytes
    assert one.coordinator.parts["activations"] == activations
    assert one.coordinator.parts["images"] == (2048 + 4 * PREDICTED) * 100  # a block of bytes, a chunk of floats
    assert one.coordinator.parts["model"] == 4 * (100 * 500 + 500 + 500 * 10 + 10)
    assert one.coordinator.parts["probabilities"] == 3 * 4 * 10 * 10_000
    two = plan_query(measured, task, 2)
    assert two.coordinator.parts["activations"] == 2 * activations
    assert two.seconds == pytest.approx(one.seconds * (10_000 - 2 * 2048) / 10_000)  # two blocks are the other shard's
    apart = plan_query(measured, task, 2, in_process=False)
    assert (apart.shard.parts["activations"], apart.shard.parts["probabilities"]) == (activations, 0)
    assert (apart.main_bytes, apart.shard_main_bytes) == (apart.coordinator.total, apart.shard.total)
    with pytest.raises(InputError, match=r"to predict needs .* more than the 1 MB available; choose a smaller model"):
        plan_query(measured, task, limit=1e6)


def test_what_is_on_a_gpu_does_not_count_as_main_memory():
    measured = small_measurement()

    def plan(in_process, gpu):
        return plan_query(measured, Task(50_000, 5), 2, in_process=in_process, gpu=gpu)

    together, apart = plan(True, False), plan(False, False)
    assert together.main_bytes == together.coordinator.total
    assert (apart.main_bytes, apart.shard_main_bytes) == (apart.coordinator.total, apart.shard.total)
    assert plan(True, True).main_bytes == apart.main_bytes < together.main_bytes
    assert plan(False, True).main_bytes == apart.main_bytes
    assert plan(False, True).shard_main_bytes < apart.shard_main_bytes


def test_more_shards_are_wanted_for_more_work_and_less_memory(monkeypatch):
    measured, task = small_measurement(), Task(330, 5)
    monkeypatch.setattr(query_plan, "BLOCK", 10)
    monkeypatch.setattr("fishermask.pool.blocks.BLOCK", 10)
    assert wanted_shards(measured, task, True) == 1
    monkeypatch.setattr(query_plan, "SECONDS_PER_SHARD", plan_query(measured, task).seconds / 7.5)
    assert wanted_shards(measured, task, True) == 8
    monkeypatch.setattr(query_plan, "SECONDS_PER_SHARD", plan_query(measured, task).seconds / 1000)
    assert wanted_shards(measured, task, True) == 33  # of 330 images: more would be empty
    monkeypatch.setattr(query_plan, "SECONDS_PER_SHARD", 1000)
    whole = plan_query(measured, task, in_process=False).largest_bytes
    assert wanted_shards(measured, task, False, 0.999 * whole) > 1
    assert wanted_shards(measured, task, True, 0.999 * whole) == 1  # they would share one process
    assert wanted_shards(simple_measurement(work=None), Task(50_000, 5), True) == 3


@pytest.mark.parametrize(
    ("settings", "wanted", "cpus", "gpus", "shards"),
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
def test_automatic_shards_are_as_many_as_wanted_where_the_cluster_has_room(settings, wanted, cpus, gpus, shards):
    assert num_shards(ResourcesConfig(**settings), wanted, Cluster(({"CPU": cpus, "GPU": gpus},))) == shards


def test_automatic_shards_count_the_nodes_that_an_autoscaler_can_start():
    resources = ResourcesConfig(shards="auto", workers="ray")
    head = ({"CPU": 2.0},)
    assert num_shards(resources, 50, Cluster(head)) == 1
    assert num_shards(resources, 50, Cluster(head, ({"CPU": 8.0},) * 3, autoscaled=True)) == 25
    assert num_shards(resources, 50, Cluster(head, autoscaled=True)) == 50  # what it can start is not known


def test_page_cache_that_can_be_reclaimed_is_free_memory(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 200\nfile 700\ninactive_file 600\n")
    assert container_memory(tmp_path) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert container_memory(tmp_path) == math.inf
    assert container_memory(tmp_path / "none") == math.inf


def test_a_plan_reads_as_one_line():
    measured = simple_measurement()
    line = str(plan_query(measured, Task(100_000, 5)))
    assert line.startswith("about 2 min per query, 1 shard, peak memory ")
    assert line.endswith("(model 1, images 0, activations 2, probabilities 12, libraries 7)".replace("images 0, ", ""))
    apart = str(plan_query(measured, Task(100_000, 5), 2, in_process=False))
    assert ", 2 shards, peak memory " in apart
    assert apart.endswith(" in each shard")
    assert str(plan_query(simple_measurement(work=None), Task(10, 5))).startswith("no computation per query, 1 shard, ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0312, "0.03 s"), (0.96, "1 s"), (7.4, "7 s"), (89, "89 s"), (95, "2 min"), (5000, "83 min"), (9000, "2.5 h")],
)
def test_seconds_are_written_as_people_say_them(seconds, text):
    assert format_seconds(seconds) == text

"""What is approximate, or kept in fewer bits, or limited by memory: options of the engine, and what they promise."""

import dataclasses
import math

import cases
import pytest
import reference
import torch
from queries import choose
from test_fisher import flat_mask, made
from test_selection import GREY, pixels
from torch import nn

from fishermask.errors import InputError
from fishermask.experiment.streams import stream
from fishermask.pool import selection
from fishermask.pool.plan import plan, plan_prediction
from fishermask.pool.pool import Engine, Pool
from fishermask.pool.selection import TraceOptions, approximation_error, minimise_trace
from fishermask.pool.shards import LocalShards
from fishermask.tensors.embedding import dense, embed, information, information_diagonal, product, quadratic
from fishermask.tensors.images import normalise
from fishermask.tensors.layout import inspect
from fishermask.tensors.mask import fisher_diagonal, global_mask, head_size, mask_size
from fishermask.tensors.memory import (
    CHUNKS,
    PREDICTED,
    PREDICTION_GAPS,
    PredictionProbe,
    Probe,
    estimate,
    fit,
    image_bytes,
    live_peak,
    prediction,
    workload,
)
from fishermask.tensors.precision import Precision


@pytest.mark.parametrize("name", ["mlp", "convolutions", "raw", "pooled"])
@pytest.mark.parametrize("q", [2, 3])
def test_the_most_probable_classes_are_embedded_as_if_there_were_no_others(name, q):
    model, images, mask = made(name)
    expected = reference.information_rows(model, images, q)[:, :, flat_mask(model, mask)]
    embedding = embed(model, images, mask, top_classes=q)
    reference.assert_same_information(reference.every_column(embedding), expected)
    assert embedding.rows == q - 1

    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(embedding.size, 5, generator=generator, dtype=torch.float64)
    square = torch.randn(embedding.size, embedding.size, generator=generator, dtype=torch.float64)
    square = square + square.mT
    v = dense(embedding)
    torch.testing.assert_close(product(embedding, matrix).permute(2, 0, 1), v @ matrix)
    torch.testing.assert_close(quadratic(embedding, square).permute(2, 0, 1), v @ square @ v.mT)
    torch.testing.assert_close(information(embedding), torch.einsum("nck,ncl->kl", v, v))
    torch.testing.assert_close(information_diagonal(embedding), v.square().sum((0, 1)))


def pool_with(engine, images, model, labeled=(3, 4, 11, 20), shards=2):
    local, labels = LocalShards(images, GREY, shards), torch.zeros(len(labeled), dtype=torch.long)
    streams = stream(0, "a"), stream(0, "b")
    return Pool(local, len(images), torch.tensor(labeled), labels, model, *streams, engine=engine)


def small():
    """A network of four classes, 24 images and their mask."""
    model, images = cases.model("mlp"), pixels(24)
    inputs = normalise(images, GREY, torch.float64)
    layout = inspect(model, inputs[:2])
    return model, images, inputs, global_mask(fisher_diagonal(model, inputs, layout), layout, 25)


def greedy_batch(rows, labeled, budget, damping):
    """What dense greedy selection chooses of embeddings ``rows`` [n, C, k] by the default objective."""
    every = torch.einsum("nck,ncl->nkl", rows, rows)
    total = len(labeled) + budget
    matrix = damping * torch.eye(rows.shape[2], dtype=torch.float64) + every[labeled].sum(0) / total
    candidates = [i for i in range(len(rows)) if i not in labeled]
    return reference.greedy(rows, candidates, matrix, every.mean(0), budget, math.sqrt(budget / total))


def test_the_batch_by_few_classes_is_that_of_their_dense_embeddings_and_its_error_is_told():
    model, images, inputs, mask = small()
    pool = pool_with(Engine(), images, model)
    options = TraceOptions(damping=0.5, top_classes=2)
    found = minimise_trace(pool, mask, 6, options).tolist()
    rows = reference.information_rows(model, inputs, 2)[:, :, flat_mask(model, mask)]
    assert found == greedy_batch(rows, [3, 4, 11, 20], 6, 0.5)

    values = []
    for q in (4, 2):  # all of the pool is in the sample
        f = torch.einsum(
            "nck,ncl->kl", *[reference.information_rows(model, inputs, q)[:, :, flat_mask(model, mask)]] * 2
        )
        f = f / len(images)
        values.append(reference.trace(0.5 * torch.eye(len(f), dtype=torch.float64) + f, f))
    name = "relative error of the objective by top_classes, on a sample"
    assert pool.notes[name] == pytest.approx(abs(values[1] - values[0]) / values[0], rel=1e-6)
    pool.embed(mask, top_classes=4)
    assert approximation_error(pool, mask, options) < 1e-12


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_kept_in_fewer_bits_give_the_batch_of_the_rounded_embeddings(storage):
    model, images, inputs, mask = small()
    engine = Engine(Precision(storage=storage, scores=torch.float64))
    found = minimise_trace(pool_with(engine, images, model), mask, 6, TraceOptions(damping=0.5)).tolist()
    exact = embed(model, inputs, mask)
    rounded = dataclasses.replace(exact, hidden=exact.hidden.to(storage), body=exact.body.to(storage))
    assert found == greedy_batch(reference.every_column(rounded.to(torch.float64)), [3, 4, 11, 20], 6, 0.5)


def test_embeddings_too_large_for_float16_are_refused():
    model, images, _, mask = small()
    with torch.no_grad():
        list(model.parameters())[-3].mul_(1e6)  # the last hidden layer's
    pool = pool_with(Engine(Precision(storage=torch.float16)), images, model)
    with pytest.raises(FloatingPointError, match="engine.storage: float16 cannot hold"):
        pool.embed(mask)


@pytest.mark.parametrize("precision", [Precision(channels_last=True), Precision(autocast=torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", ["thin_resnet18", "norms", "convnext_tiny"])
def test_other_ways_to_compute_gradients_give_nearly_the_same_embeddings(name, precision):
    model, images = cases.model(name).float(), torch.randint(0, 256, (6, cases.CHANNELS.get(name, 1), 8, 8)).byte()
    layout = inspect(model, normalise(images[:2], GREY))
    mask = global_mask(fisher_diagonal(model, normalise(images, GREY), layout), layout, 40)
    found = []
    for used in (Precision(), precision):
        pool = pool_with(Engine(used), images, model, [0], 1)
        pool.embed(mask)
        found.append(torch.cat([dense(e) for e in pool.embeddings_at(torch.arange(6))]))
    error = float((found[1] - found[0]).norm() / found[0].norm())
    # bfloat16 keeps 8 bits, and loses some in each of many layers; the memory layout changes the order of sums only.
    assert 0 <= error < (0.3 if precision.autocast else 1e-5)
    assert precision.autocast is None or error > 1e-6


def test_the_chunk_in_which_images_are_differentiated_changes_nothing(trained):
    """Not a bit, on trained float32 networks: a chunk may be as small as memory wants it."""
    setup, model = trained
    images = setup.data.train.images[:150]
    mask, found = None, []
    for chunk in CHUNKS:
        pool = Pool(LocalShards(images, setup.statistics), 150, torch.tensor([0]), torch.tensor([0]), model,
                    stream(0, "a"), stream(0, "b"), engine=Engine(chunk=chunk))  # fmt: skip
        if mask is None:
            layout = pool.layout()
            mask = global_mask(pool.fisher_diagonal(layout, 64), layout, 500)
        pool.embed(mask)
        found.append(torch.cat([dense(e) for e in pool.embeddings_at(torch.arange(150))]))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_scores_are_computed_anew_when_they_have_drifted(trained):
    setup, model = trained

    def notes(drift):
        found = {}
        shards = LocalShards(setup.data.train.images, setup.statistics, 2)
        choose("bait", shards, setup, model, 60, Engine(drift=drift), found.update)
        return found

    never, often = notes(1e9), notes(1e-12)
    again = "times scores were computed anew"
    assert again not in never
    assert often[again] == 59 // selection.RESCORE_AFTER
    assert 0 < often["largest drift of a gain"] <= never["largest drift of a gain"] < 1e-2
    assert often["objective"] == pytest.approx(never["objective"], rel=1e-4)


@pytest.mark.parametrize("name", ["bait", "coreset", "badge"])
def test_a_journal_is_gone_on_from_as_if_the_selection_had_never_stopped(name, trained, monkeypatch):
    setup, model = trained
    monkeypatch.setattr(selection, "RESCORE_EVERY", 8)

    def run(past, **engine):
        made = []
        shards = LocalShards(setup.data.train.images, setup.statistics, 2)
        used = Engine(past=past, journal=lambda *pick: made.append(pick), **engine)
        return choose(name, shards, setup, model, 21, used), made

    batch, journal = run([])
    assert [position for position, _ in journal] == batch
    assert [i for i, (_, anew) in enumerate(journal) if anew] == ([0, 8, 16] if name == "bait" else [0])
    for stopped in (1, 8, 9, 20):
        assert run(journal[:stopped]) == (batch, journal[stopped:])


def test_bytes_are_counted_when_most_tensors_are_alive():
    def work():
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1  # 8,000
        del a
        c = torch.cat([b, b])  # 12,000
        return c.view(2, 1000).mul_(2)[0]  # no more

    assert live_peak(work) == 12_000


def test_memory_decides_the_chunk_and_what_cannot_fit_is_refused():
    model, images = cases.model("thin_resnet18").float(), torch.zeros(1, 1, 8, 8)
    work = workload(model, images, inspect(model, torch.zeros(2, 1, 8, 8)), 50)
    probe = Probe(model, images, work)
    settings = {"images": 50_000, "block": 2048, "part": 2048, "storage": torch.float32, "scores": torch.float32}
    needs = [estimate(probe, chunk=chunk, **settings).total for chunk in CHUNKS]
    for chunk, need in zip(CHUNKS, needs, strict=True):
        assert fit(probe, need, **settings).chunk in {c for c, n in zip(CHUNKS, needs, strict=True) if n == need} | {
            chunk
        }
    with pytest.raises(
        InputError, match=r"resources.memory: a query needs .* which is more than the 1 MB there are; set"
    ):
        fit(probe, 1e6, **settings)
    half = estimate(probe, chunk=16, **settings | {"storage": torch.bfloat16}).parts["embeddings"]
    assert half < 0.6 * estimate(probe, chunk=16, **settings).parts["embeddings"]


def test_25000_images_of_the_papers_network_take_less_than_300_mb():
    model, image = cases.models.build("thin_resnet18", {}, (3, 32, 32), 10, seed=0).eval(), torch.zeros(1, 3, 32, 32)
    layout = inspect(model, image.expand(2, -1, -1, -1))
    work = workload(model, image, layout, mask_size(model, layout, 0.002) - head_size(model, layout))
    assert 25_000 * sum(image_bytes(work, torch.float32, torch.float32, torch.float32)) < 300e6


def test_a_model_without_a_linear_head_is_planned_for_too():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    work = workload(model, torch.zeros(2, 1, 8, 8), inspect(model, torch.zeros(2, 1, 8, 8)), 10)
    assert (work.width, work.size) == (0, 10)
    assert plan(Probe(model, torch.zeros(1, 1, 8, 8), work), 100, 5, 3, True, Precision()).chunk == CHUNKS[0]


@pytest.mark.parametrize("position", [0, 300, 899])
def test_an_image_without_finite_outputs_is_an_error_wherever_it_is(position, monkeypatch):
    """In any part of any shard: a maximum of numbers must not pass over what is none."""
    monkeypatch.setattr("fishermask.pool.shard.BLOCK", 256)
    model, images, _, mask = small()
    images = pixels(900)
    pool = pool_with(Engine(), images, model, [5, 899], 2)
    pool.embed(mask)
    for shard in pool.shards.shards:
        for part, embedding in zip(shard.parts, shard.embeddings, strict=True):
            if part.start <= position - shard.start < part.stop:
                embedding.hidden[0, position - shard.start - part.start] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        selection.objective_of(pool, 5, TraceOptions(initial_information=False))


def test_shards_without_images_need_no_memory_and_are_not_wanted():
    model, image = cases.model("small_cnn").float(), torch.zeros(1, 1, 8, 8)
    probe = Probe(model, image, workload(model, image, inspect(model, torch.zeros(2, 1, 8, 8)), 30))
    one, many = (plan(probe, 1800, 5, shards, True, Precision()).process for shards in (1, 9))
    assert many == one


def test_a_prediction_takes_the_activations_of_a_block_and_the_probabilities_of_all():
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 500), nn.ReLU(), nn.Linear(500, 10)).requires_grad_(False)
    image = torch.zeros(1, 1, 10, 10)
    probe = PredictionProbe(model, image, prediction(model, image))
    assert 4 * (100 + 500) <= probe.image <= 4 * (100 + 2 * 500 + 10)
    one = plan_prediction(probe, 10_000, 1, True)
    assert one.process.parts["activations"] == PREDICTION_GAPS * PREDICTED * probe.image
    assert one.process.parts["images"] == (2048 + 4 * PREDICTED) * 100  # a block of bytes, a chunk of floats
    assert one.process.parts["model"] == 4 * (100 * 500 + 500 + 500 * 10 + 10)
    assert one.process.parts["probabilities"] == 3 * 4 * 10 * 10_000
    two = plan_prediction(probe, 10_000, 2, True)
    assert two.process.parts["activations"] == 2 * one.process.parts["activations"]
    assert two.seconds == pytest.approx(one.seconds * (10_000 - 2 * 2048) / 10_000)  # two blocks are the other shard
    apart = plan_prediction(probe, 10_000, 2, False)
    assert apart.shard.parts == {
        **apart.shard.parts,
        "activations": PREDICTION_GAPS * PREDICTED * probe.image,
        "probabilities": 0,
    }
    assert (apart.main, apart.shard_main) == (apart.process.total, apart.shard.total)
    with pytest.raises(InputError, match=r"resources.memory: a query needs .* than the 1 MB there are; give it more"):
        plan_prediction(probe, 10_000, 1, True, memory=1e6)


def test_what_is_on_a_gpu_does_not_count_as_main_memory():
    model, image = cases.model("small_cnn").float(), torch.zeros(1, 1, 8, 8)
    probe = Probe(model, image, workload(model, image, inspect(model, torch.zeros(2, 1, 8, 8)), 30))

    def planned(in_process, gpu):
        return plan(probe, 50_000, 5, 2, in_process, Precision(), math.inf, gpu)

    together, apart = planned(True, False), planned(False, False)
    assert (together.main, apart.main, apart.shard_main) == (
        together.process.total, apart.process.total, apart.shard.total
    )  # fmt: skip
    assert planned(True, True).main == apart.main < together.main
    assert planned(False, True).main == apart.main
    assert planned(False, True).shard_main < apart.shard_main

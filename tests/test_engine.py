"""Options of the engine: approximations, lower precision, chunks, rescoring and replay."""

import dataclasses
import math

import cases
import pytest
import reference
import torch
from queries import choose
from test_fisher import flat_mask, masked_case
from test_selection import GRAY, pixels

from fishermask.experiment.streams import stream
from fishermask.pool import selection
from fishermask.pool.blocks import CHUNKS
from fishermask.pool.pool import Engine, Pool
from fishermask.pool.selection import TraceOptions, approximation_error, minimize_trace
from fishermask.pool.shards import LocalShards
from fishermask.tensors.embedding import dense, embed, information, information_diagonal, product, quadratic
from fishermask.tensors.gradient_plan import plan_gradients
from fishermask.tensors.images import normalize
from fishermask.tensors.mask import fisher_diagonal, global_mask, last_layer_mask
from fishermask.tensors.precision import Precision


@pytest.mark.parametrize("name", ["mlp", "convolutions", "raw", "pooled"])
@pytest.mark.parametrize("q", [2, 3])
def test_top_classes_embeddings_equal_those_of_a_softmax_over_these_classes(name, q):
    model, images, mask = masked_case(name)
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
    local, labels = LocalShards(images, GRAY, shards), torch.zeros(len(labeled), dtype=torch.long)
    streams = stream(0, "a"), stream(0, "b")
    return Pool(local, len(images), torch.tensor(labeled), labels, model, *streams, engine=engine)


def small():
    """Return a network of four classes, 24 images, their inputs and a mask."""
    model, images = cases.model("mlp"), pixels(24)
    inputs = normalize(images, GRAY, torch.float64)
    plan = plan_gradients(model, inputs[:2])
    return model, images, inputs, global_mask(fisher_diagonal(model, inputs, plan), plan, 25)


def greedy_batch(rows, labeled, budget, damping):
    """Return the batch of dense greedy selection from embeddings ``rows`` [n, C, k] with default options."""
    every = torch.einsum("nck,ncl->nkl", rows, rows)
    total = len(labeled) + budget
    matrix = damping * torch.eye(rows.shape[2], dtype=torch.float64) + every[labeled].sum(0) / total
    candidates = [i for i in range(len(rows)) if i not in labeled]
    return reference.greedy(rows, candidates, matrix, every.mean(0), budget, math.sqrt(budget / total))


def test_top_classes_batch_equals_dense_greedy_and_its_error_is_recorded():
    model, images, inputs, mask = small()
    pool = pool_with(Engine(), images, model)
    options = TraceOptions(damping=0.5, top_classes=2)
    batch = minimize_trace(pool, mask, 6, options).tolist()
    rows = reference.information_rows(model, inputs, 2)[:, :, flat_mask(model, mask)]
    assert batch == greedy_batch(rows, [3, 4, 11, 20], 6, 0.5)

    values = []
    for q in (4, 2):  # all of the pool is in the sample
        f = torch.einsum(
            "nck,ncl->kl", *[reference.information_rows(model, inputs, q)[:, :, flat_mask(model, mask)]] * 2
        )
        f = f / len(images)
        values.append(reference.trace(0.5 * torch.eye(len(f), dtype=torch.float64) + f, f))
    name = "relative error of top_classes"
    assert pool.notes[name] == pytest.approx(abs(values[1] - values[0]) / values[0], rel=1e-6)
    pool.store_embeddings(mask, top_classes=4)
    assert approximation_error(pool, mask, options) < 1e-12


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_storage_gives_the_batch_of_rounded_embeddings(storage):
    model, images, inputs, mask = small()
    engine = Engine(Precision(storage=storage, scores=torch.float64))
    batch = minimize_trace(pool_with(engine, images, model), mask, 6, TraceOptions(damping=0.5)).tolist()
    exact = embed(model, inputs, mask)
    rounded = dataclasses.replace(exact, hidden=exact.hidden.to(storage), body=exact.body.to(storage))
    assert batch == greedy_batch(reference.every_column(rounded.to(torch.float64)), [3, 4, 11, 20], 6, 0.5)


def test_embeddings_too_large_for_float16_are_refused():
    model, images, _, mask = small()
    with torch.no_grad():
        list(model.parameters())[-3].mul_(1e6)  # the last hidden layer's
    pool = pool_with(Engine(Precision(storage=torch.float16)), images, model)
    with pytest.raises(FloatingPointError, match="engine.storage: float16 cannot hold"):
        pool.store_embeddings(mask)


@pytest.mark.parametrize("precision", [Precision(channels_last=True), Precision(autocast=torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", ["thin_resnet18", "norms", "convnext_tiny"])
def test_channels_last_and_autocast_give_nearly_the_same_embeddings(name, precision):
    model, images = cases.model(name).float(), torch.randint(0, 256, (6, cases.CHANNELS.get(name, 1), 8, 8)).byte()
    plan = plan_gradients(model, normalize(images[:2], GRAY))
    mask = global_mask(fisher_diagonal(model, normalize(images, GRAY), plan), plan, 40)
    embeddings = []
    for setting in (Precision(), precision):
        pool = pool_with(Engine(setting), images, model, [0], 1)
        pool.store_embeddings(mask)
        embeddings.append(torch.cat([dense(e) for e in pool.embeddings_at(torch.arange(6))]))
    error = float((embeddings[1] - embeddings[0]).norm() / embeddings[0].norm())
    # bfloat16 keeps 8 bits, and loses some in each of many layers; the memory plan changes the order of sums only.
    assert 0 <= error < (0.3 if precision.autocast else 1e-5)
    assert precision.autocast is None or error > 1e-6


def test_embeddings_do_not_depend_on_the_chunk_size(trained):
    """To the last bit, on trained float32 networks."""
    setup, model = trained
    images = setup.data.train.images[:150]
    mask, embeddings = None, []
    for chunk in CHUNKS:
        pool = Pool(LocalShards(images, setup.statistics), 150, torch.tensor([0]), torch.tensor([0]), model,
                    stream(0, "a"), stream(0, "b"), engine=Engine(chunk=chunk))  # fmt: skip
        if mask is None:
            plan = pool.plan_gradients()
            mask = global_mask(pool.fisher_diagonal(plan, 64), plan, 500)
        pool.store_embeddings(mask)
        embeddings.append(torch.cat([dense(e) for e in pool.embeddings_at(torch.arange(150))]))
    assert all(torch.equal(embeddings[0], other) for other in embeddings[1:])


def test_scores_are_recomputed_when_the_gain_error_exceeds_drift(trained, monkeypatch):
    setup, model = trained
    monkeypatch.setattr(selection.TraceCriterion, "use_float64", lambda self: False)

    def notes(drift):
        pool_notes = {}
        shards = LocalShards(setup.data.train.images, setup.statistics, 2)
        choose("bait", shards, setup, model, 60, Engine(drift=drift), pool_notes.update)
        return pool_notes

    never, often = notes(1e9), notes(1e-12)
    name = "rescores"
    assert name not in never
    assert often[name] == 59 // selection.MIN_RESCORE_INTERVAL
    assert 0 < often["largest gain error"] <= never["largest gain error"] < 1e-2
    assert often["objective"] == pytest.approx(never["objective"], rel=1e-4)


@pytest.mark.parametrize("name", ["bait", "coreset", "badge"])
def test_replay_of_journal_gives_the_uninterrupted_batch(name, trained, monkeypatch):
    setup, model = trained
    monkeypatch.setattr(selection, "MAX_RESCORE_INTERVAL", 8)

    def run(past, **engine):
        recorded = []
        shards = LocalShards(setup.data.train.images, setup.statistics, 2)
        engine_settings = Engine(past_picks=past, record_pick=lambda *pick: recorded.append(pick), **engine)
        return choose(name, shards, setup, model, 21, engine_settings), recorded

    batch, journal = run([])
    assert [position for position, _ in journal] == batch
    assert [i for i, (_, rescore) in enumerate(journal) if rescore] == ([0, 8, 16] if name == "bait" else [0])
    for stopped in (1, 8, 9, 20):
        assert run(journal[:stopped]) == (batch, journal[stopped:])


@pytest.mark.parametrize("position", [0, 300, 899])
def test_non_finite_outputs_of_any_image_raise(position, monkeypatch):
    """In every part of every shard: a maximum must not ignore NaN."""
    monkeypatch.setattr("fishermask.pool.shard.BLOCK", 256)
    model, images, _, mask = small()
    images = pixels(900)
    pool = pool_with(Engine(), images, model, [5, 899], 2)
    pool.store_embeddings(mask)
    for shard in pool.shards.shards:
        for part, embedding in zip(shard.parts, shard.embeddings, strict=True):
            if part.start <= position - shard.start < part.stop:
                embedding.hidden[0, position - shard.start - part.start] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        selection.initial_objective(pool, 5, TraceOptions(initial_information=False))


@pytest.mark.parametrize("num_last", [1, 2, 3])
def test_embeddings_of_the_last_images_do_not_depend_on_the_size_of_their_chunk(num_last):
    """Kernels may round differently for few images, and the last chunk of a pool may be small."""
    model, images = cases.models.build("mlp", {}, (1, 8, 8), 4, seed=0), pixels(128 + num_last)
    embeddings = []
    for shift in (0, num_last):
        pool = pool_with(Engine(), images.roll(shift, 0), model, [50], 1)
        pool.store_embeddings(last_layer_mask(pool.plan_gradients()))
        last = torch.arange(num_last) + (128 if shift == 0 else 0)
        embeddings.append(torch.cat([dense(e) for e in pool.embeddings_at(last)]))
    assert torch.equal(*embeddings)

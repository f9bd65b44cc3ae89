"""Queries for which float32, or Woodbury updates alone, are too imprecise, compared with dense float64 matrices."""

import cases
import pytest
import reference
import torch
from queries import choose

from fishermask.experiment.streams import stream
from fishermask.pool import selection
from fishermask.pool.pool import Engine, Pool, Rescore
from fishermask.pool.selection import TraceOptions, minimize_trace
from fishermask.pool.shards import LocalShards
from fishermask.tensors.embedding import add_identity, embed, information, take
from fishermask.tensors.gradient_plan import plan_gradients
from fishermask.tensors.images import Statistics, normalize
from fishermask.tensors.mask import last_layer_mask
from fishermask.tensors.precision import Precision
from fishermask.tensors.trace import Objective

GRAY = Statistics((0.5,), (0.25,))
COUNT, LABELED, BUDGET = 120, [3, 50, 77], 12


def pixels(count):
    return torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def certain_model(dtype):
    """Return a model with nearly certain predictions, so that some directions have little information."""
    model = cases.model("mlp")
    with torch.no_grad():
        model[-1].weight.mul_(6)
    return model.to(dtype)


def minimize(options, dtype=torch.float32, **engine):
    model, images = certain_model(dtype), pixels(COUNT)
    shards = LocalShards(images, GRAY, 1)
    pool = Pool(shards, COUNT, torch.tensor(LABELED), torch.zeros(len(LABELED), dtype=torch.long), model,
                stream(0, "a"), stream(0, "b"), engine=Engine(**engine))  # fmt: skip
    mask = last_layer_mask(plan_gradients(model, normalize(images[:4], GRAY, dtype)))
    return minimize_trace(pool, mask, BUDGET, options).tolist(), pool.notes


def dense(options):
    """Return batch and objective from dense float64 matrices, with a new inverse for every trace."""
    model, inputs = certain_model(torch.float64), normalize(pixels(COUNT), GRAY, torch.float64)
    rows = reference.information_rows(model, inputs)[:, :, reference.head_entries(model, "5")]
    if options.class_weighting == "none":
        rows = rows / model(inputs).detach().softmax(-1).sqrt()[:, :, None]
    every = torch.einsum("nck,ncl->nkl", rows, rows)
    total = len(LABELED) + BUDGET
    scale, target = (BUDGET / total) ** 0.5, every.mean(0)
    matrix = options.damping * torch.eye(rows.shape[2], dtype=torch.float64)
    matrix = matrix + len(LABELED) / total * every[LABELED].mean(0)
    candidates = [i for i in range(COUNT) if i not in LABELED]
    chosen = reference.greedy(rows, candidates, matrix, target, round(options.oversample * BUDGET), scale)
    while len(chosen) > BUDGET:
        remainders = [[c for c in chosen if c != worst] for worst in chosen]
        traces = [reference.trace(matrix + scale**2 * every[remainder].sum(0), target) for remainder in remainders]
        chosen = remainders[min(range(len(remainders)), key=lambda i: traces[i])]
    return chosen, reference.trace(matrix + scale**2 * every[chosen].sum(0), target)


@pytest.mark.parametrize("damping", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("weighting", ["sqrt", "none"])
def test_small_damping_gives_the_batch_of_dense_float64(damping, weighting):
    options = TraceOptions(damping=damping, class_weighting=weighting)
    expected, objective = dense(options)
    batch, notes = minimize(options)
    assert batch == expected
    assert notes["objective"] == pytest.approx(objective, rel=1e-4)
    assert notes["largest gain error"] < selection.IMPRECISE * Engine().drift


@pytest.mark.parametrize("damping", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("weighting", ["sqrt", "none"])
def test_pruning_with_small_damping_equals_dense_float64(damping, weighting):
    options = TraceOptions(damping=damping, class_weighting=weighting, oversample=2.0)
    expected, objective = dense(options)
    batch, notes = minimize(options, torch.float64)
    assert batch == expected
    assert notes["objective"] == pytest.approx(objective, rel=1e-7)


def test_float64_is_noted_only_if_float32_is_too_imprecise():
    hard = TraceOptions(damping=1e-4, class_weighting="none")
    assert minimize(hard)[1]["picks before float64"] < BUDGET
    for notes in (minimize(hard, precision=Precision(scores=torch.float64))[1], minimize(TraceOptions())[1]):
        assert "picks before float64" not in notes


def test_float32_gains_have_large_errors_with_small_damping(monkeypatch):
    """The other tests here rely on this."""
    monkeypatch.setattr(selection.TraceCriterion, "use_float64", lambda self: False)
    worst = max(
        minimize(TraceOptions(damping=damping, class_weighting="none"))[1]["largest gain error"]
        for damping in (1e-3, 1e-4)
    )
    assert worst > 0.05


def test_replay_of_journal_with_float64_scores_gives_the_uninterrupted_batch(trained):
    setup, model = trained

    def run(past):
        recorded = []
        shards = LocalShards(setup.data.train.images, setup.statistics, 2)
        engine = Engine(past_picks=past, record_pick=lambda *pick: recorded.append(pick), drift=1e-7)
        return choose("bait", shards, setup, model, 12, engine), recorded

    batch, journal = run([])
    assert Rescore.FLOAT64 in [rescore for _, rescore in journal]
    for stopped in (1, 5, 11):
        assert run(journal[:stopped]) == (batch, journal[stopped:])


def test_estimated_objective_error_has_the_size_of_the_true_error():
    generator = torch.Generator().manual_seed(0)
    model, inputs = certain_model(torch.float64), normalize(pixels(20), GRAY, torch.float64)
    embedding = embed(model, inputs, last_layer_mask(plan_gradients(model, inputs)))
    start = torch.zeros(embedding.size, embedding.size, dtype=torch.float64)
    add_identity(start, 0.01, embedding.num_classes, len(embedding.hidden))
    objective = Objective(start, information(embedding) / 20, keep_inputs=True)
    for i in range(20):
        objective.add(take(embedding, slice(i, i + 1)))
    exact = objective.rebuild(embedding)
    assert objective.error(embedding) < 1e-9
    assert objective.value == pytest.approx(exact.value, rel=1e-9)
    wrong = torch.randn(embedding.size, embedding.size, generator=generator, dtype=torch.float64)
    objective.inverse += 1e-3 * objective.inverse.abs().max() * (wrong + wrong.mT)
    truth = abs(float((objective.inverse * information(embedding) / 20).sum()) - exact.value) / exact.value
    assert truth / 30 < objective.error(embedding) < 30 * truth


@pytest.mark.parametrize(("damping", "oversample"), [(1e-13, 1.0), (1e-15, 1.0), (1e-15, 2.0)])
def test_damping_too_small_for_float64_raises(damping, oversample):
    options = TraceOptions(damping=damping, oversample=oversample, initial_information=False)
    with pytest.raises(FloatingPointError, match="strategy.params.damping: too small"):
        minimize(options, torch.float64)

"""Fisher diagonal, mask, embeddings and their products compared with reference implementations."""

from fnmatch import fnmatch

import cases
import pytest
import reference
import torch
from torch import nn

from fishermask.errors import InputError
from fishermask.tensors.embedding import add_identity, concatenate, dense, embed, information, product, quadratic, take
from fishermask.tensors.gradient_plan import GradientPlan, plan_gradients, warn_about_slow_parameters
from fishermask.tensors.mask import (
    Mask,
    body_parameters,
    fisher_diagonal,
    global_mask,
    head_size,
    last_layer_mask,
    layerwise_mask,
    mask_size,
    random_mask,
    relative_mask,
)
from fishermask.tensors.trace import Objective, gains, initial_scores, update_scores


def flat_mask(model, mask: Mask) -> torch.Tensor:
    """Return the masked entries as indices into all parameters, in the order of an embedding's columns."""
    head = mask.plan.head
    indices, start = [] if head is None else [reference.head_entries(model, head)], 0
    for name, parameter in model.named_parameters():
        if name in mask.entries:
            indices.append(mask.entries[name] + start)
        start += parameter.numel()
    return torch.cat(indices)


def masked_case(name: str, body_size: int = 40):
    """Return a model, images and a mask of the largest Fisher information."""
    model, images = cases.model(name), cases.images(name, 2 if name == "resnet18" else 6)
    plan = plan_gradients(model, images[:2])
    return model, images, global_mask(fisher_diagonal(model, images, plan), plan, body_size)


@pytest.mark.parametrize("name", cases.NAMES)
def test_all_test_models_have_nonzero_gradients(name):
    """A network without gradients would pass every test here."""
    model, images = cases.model(name), cases.images(name, 2)
    diagonal = torch.cat(list(fisher_diagonal(model, images, plan_gradients(model, images)).values()))
    # Where 3 x 3 kernels meet images of one pixel, eight of nine weights see nothing but padding.
    assert (diagonal > 0).double().mean() > (0.03 if "resnet" in name else 0.4)


@pytest.mark.parametrize("name", cases.NAMES)
def test_fisher_diagonal_equals_the_expected_squared_score_by_autograd(name):
    model, images = cases.model(name), cases.images(name, 2 if name == "resnet18" else 5)
    plan = plan_gradients(model, images[:2])
    expected = reference.information_rows(model, images).square().sum((0, 1))
    body = torch.ones(len(expected), dtype=torch.bool)
    if plan.head is not None:
        body[reference.head_entries(model, plan.head)] = False
    actual = torch.cat(list(fisher_diagonal(model, images, plan).values()))
    torch.testing.assert_close(actual, expected[body], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", cases.NAMES)
def test_embeddings_equal_the_masked_columns_of_autograd(name):
    model, images, mask = masked_case(name)
    expected = reference.information_rows(model, images)[:, :, flat_mask(model, mask)]
    reference.assert_same_information(reference.every_column(embed(model, images, mask)), expected)


@pytest.mark.parametrize("name", cases.NAMES)
def test_full_and_sparse_masks_of_every_layer_equal_autograd(name):
    """Cover every entry of every layer, by the dense and by the gathered computation."""
    model, images = cases.model(name), cases.images(name, 2)
    plan = plan_gradients(model, images[:2])
    body = body_parameters(model, plan)
    full = Mask(plan, {name: torch.arange(p.numel()) for name, p in body.items()})
    sparse = Mask(plan, {name: torch.arange(0, p.numel(), max(1, p.numel() // 3)) for name, p in body.items()})
    rows = reference.information_rows(model, images)
    for mask in (full, sparse):
        expected = rows[:, :, flat_mask(model, mask)]
        reference.assert_same_information(reference.every_column(embed(model, images, mask)), expected)


def test_global_mask_takes_the_largest_entries_and_breaks_ties_by_index():
    diagonal = {"a.weight": torch.tensor([1.0, 5.0, 5.0, 0.0]), "b.weight": torch.tensor([5.0, 7.0, 5.0])}
    mask = global_mask(diagonal, GradientPlan("head", (), ()), 4)
    assert {name: entries.tolist() for name, entries in mask.entries.items()} == {
        "a.weight": [1, 2],
        "b.weight": [0, 1],
    }
    assert mask.body_size == 4
    assert mask.layers == ["a", "b"]


DIAGONAL = {
    "a.weight": torch.tensor([8.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
    "a.bias": torch.tensor([9.0, 3.0]),
    "b.weight": torch.tensor([0.1, 0.9, 0.1, 0.1]),
}
PLAN = GradientPlan("head", ("a", "b"), ())


def listed(mask):
    return {name: entries.tolist() for name, entries in mask.entries.items()}


def test_layerwise_mask_takes_the_same_share_of_every_layer():
    # 6 of 12: 4 of layer a's 8 parameters, 2 of layer b's 4.
    assert listed(layerwise_mask(DIAGONAL, PLAN, 6)) == {"a.weight": [0, 1], "a.bias": [0, 1], "b.weight": [0, 1]}
    # 7 of 12 is 4.67 and 2.33: the remaining entry goes to the larger remainder.
    assert listed(layerwise_mask(DIAGONAL, PLAN, 7)) == {"a.weight": [0, 1, 2], "a.bias": [0, 1], "b.weight": [0, 1]}
    for size in range(13):
        assert layerwise_mask(DIAGONAL, PLAN, size).body_size == size


def test_relative_mask_takes_entries_above_twice_the_mean_of_their_layer():
    # Layer a has mean 3, so above 6: 8 and 9; layer b has mean 0.3, so above 0.6: 0.9, the furthest above its mean.
    assert listed(relative_mask(DIAGONAL, PLAN, 6)) == {"a.weight": [0], "a.bias": [0], "b.weight": [1]}
    assert listed(relative_mask(DIAGONAL, PLAN, 2)) == {"a.bias": [0], "b.weight": [1]}
    dead = DIAGONAL | {"b.weight": torch.zeros(4)}
    assert listed(relative_mask(dead, PLAN, 6)) == {"a.weight": [0], "a.bias": [0]}


def test_random_mask_has_the_requested_size_and_is_uniform():
    counts = torch.zeros(12)
    for seed in range(600):
        mask = random_mask(DIAGONAL, PLAN, 4, torch.Generator().manual_seed(seed))
        assert mask.body_size == 4
        flat = torch.cat([mask.entries.get(name, torch.tensor([], dtype=torch.long)) + start
                          for name, start in (("a.weight", 0), ("a.bias", 6), ("b.weight", 8))])  # fmt: skip
        counts[flat] += 1
    assert (counts / 600 - 1 / 3).abs().max() < 0.08


def test_too_small_fraction_is_refused_with_the_smallest_that_works():
    model = cases.model("mlp")
    plan = plan_gradients(model, cases.images("mlp", 2))
    with pytest.raises(InputError, match="the smallest fraction that works is (.*)") as caught:
        mask_size(model, plan, 0.001)
    smallest = float(str(caught.value).rsplit(" ", 1)[1])
    needed, total = head_size(model, plan), sum(p.numel() for p in model.parameters())
    assert mask_size(model, plan, smallest) >= needed
    assert smallest < 1.001 * needed / total
    with pytest.raises(InputError):
        mask_size(model, plan, (needed - 1) / total)


@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_structured_products_equal_dense_products(name):
    model, images, mask = masked_case(name)
    embedding = embed(model, images, mask)
    v = dense(embedding)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(embedding.size, 5, generator=generator, dtype=torch.float64)
    square = torch.randn(embedding.size, embedding.size, generator=generator, dtype=torch.float64)
    square = square + square.mT
    torch.testing.assert_close(product(embedding, matrix).permute(2, 0, 1), v @ matrix)
    torch.testing.assert_close(quadratic(embedding, square).permute(2, 0, 1), v @ square @ v.mT)
    torch.testing.assert_close(information(embedding), torch.einsum("nck,ncl->kl", v, v))


@pytest.mark.parametrize("body_size", [0, 30])
def test_gains_equal_the_decrease_of_the_dense_trace(body_size):
    model, images, mask = masked_case("small_cnn", body_size)
    embedding = embed(model, images, mask)
    v, scale = reference.every_column(embedding), 0.6
    target = torch.einsum("nck,ncl->kl", v, v) / len(v)
    matrix = 0.3 * torch.eye(v.shape[2], dtype=torch.float64) + 0.1 * target
    # The same without the columns of the last class.
    free = dense(embedding)
    free_target = torch.einsum("nck,ncl->kl", free, free) / len(v)
    start = 0.1 * free_target
    add_identity(start, 0.3, embedding.num_classes, len(embedding.hidden))
    objective = Objective(start, free_target, scale)
    scores = initial_scores(embedding, *objective.matrices())
    for pick in (2, 0, 5):
        before = reference.trace(matrix, target)
        expected = [before - reference.trace(matrix + scale**2 * row.mT @ row, target) for row in v]
        torch.testing.assert_close(gains(scores), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-10)
        assert objective.value == pytest.approx(before, rel=1e-9)
        update_scores(scores, embedding, objective.add(take(embedding, slice(pick, pick + 1))))
        matrix = matrix + scale**2 * v[pick].mT @ v[pick]


def test_embeddings_do_not_depend_on_the_batch():
    model, images, mask = masked_case("thin_resnet18")
    together = embed(model, images, mask)
    separate = concatenate([embed(model, part, mask) for part in images.split(4)])
    torch.testing.assert_close(dense(together), dense(separate))


def test_last_layer_mask_computes_no_gradients():
    model, images = cases.model("mlp"), cases.images("mlp", 3)
    plan = plan_gradients(model, images[:2])
    mask = last_layer_mask(plan)
    expected = reference.information_rows(model, images)[:, :, flat_mask(model, mask)]
    reference.assert_same_information(reference.every_column(embed(model, images, mask)), expected)


@pytest.mark.parametrize(
    ("name", "head", "slow"),
    [
        ("mlp", "5", []),
        ("resnet18", "fc", []),
        ("mobilenet_v3_small", "classifier.3", []),
        ("convnext_tiny", "classifier.2", ["*.layer_scale", "features.0.1.*", "features.2.0.*", "classifier.0.*"]),
        ("vit_b_16", "heads.head", ["class_token", "encoder.pos_embedding", "*in_proj*", "*out_proj*"]),
        ("twice", "head", ["inner.weight", "inner.bias"]),
        ("tied", "head", ["first.weight"]),
        ("raw", "head", ["scale"]),
        ("pooled", None, []),
    ],
)  # fmt: skip
def test_parameters_without_a_gradient_rule_are_listed(name, head, slow):
    model = cases.model(name)
    plan = plan_gradients(model, cases.images(name, 2))
    assert plan.head == head
    for parameter in plan.slow:
        assert any(fnmatch(parameter, pattern) for pattern in slow), parameter
    for pattern in slow:
        assert any(fnmatch(parameter, pattern) for parameter in plan.slow), pattern
    modules = {layer: model.get_submodule(layer) for layer in plan.layers}
    fast = {f"{layer}.{leaf}" for layer, m in modules.items() for leaf, _ in m.named_parameters(recurse=False)}
    assert fast | set(plan.slow) == set(body_parameters(model, plan))
    assert not fast & set(plan.slow)


def test_warning_about_slow_parameters_appears_once(caplog):
    warn_about_slow_parameters.cache_clear()
    for _ in range(2):
        warn_about_slow_parameters(("a", "b", "c", "d", "e"))
        warn_about_slow_parameters(())
    assert [record.message for record in caplog.records] == [
        "model: 5 parameters have no gradient rule and are differentiated image by image, which is slow: "
        "a, b, c, d and 1 more"
    ]


def test_models_without_per_image_gradients_are_refused():
    with pytest.raises(InputError, match="normalizes by the batch itself"):
        plan_gradients(nn.Sequential(nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 2)), torch.zeros(2, 8))
    with pytest.raises(InputError, match="must return logits"):
        plan_gradients(nn.Sequential(nn.Linear(8, 2), nn.Unflatten(1, (2, 1))), torch.zeros(2, 8))
    no_head = plan_gradients(nn.Sequential(nn.Linear(8, 2), nn.Softplus()), torch.zeros(2, 8))
    with pytest.raises(InputError, match="does not end in a linear layer"):
        last_layer_mask(no_head)


def test_information_of_a_large_body_does_not_depend_on_the_strip_size(monkeypatch):
    model, images, mask = masked_case("small_cnn")
    embedding = embed(model, images, mask)
    monkeypatch.setattr("fishermask.tensors.embedding.STRIP", 16)
    v = dense(embedding)
    torch.testing.assert_close(information(embedding), torch.einsum("nck,ncl->kl", v, v))

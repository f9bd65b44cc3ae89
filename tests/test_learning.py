"""Models, training, images, metrics and random streams."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, recall_score

from fishermask.errors import InputError
from fishermask.experiment.streams import stream
from fishermask.learning import models, training
from fishermask.learning.metrics import evaluate
from fishermask.learning.training import fit, predict
from fishermask.tensors.images import CROP_PADDING, Statistics, channel_statistics, crop_and_flip, normalize

GRAY = Statistics((0.5,), (0.25,))
SETTINGS = {"learning_rate": 1e-2, "batch_size": 8, "target_accuracy": 0.99, "clip": 0.1, "augmentation": None}


@pytest.mark.parametrize(
    ("channels", "classes", "count"), [(3, 10, 701_456), (3, 4, 700_688), (1, 10, 701_168), (1, 4, 700_400)]
)
def test_thin_resnet18_has_the_papers_number_of_parameters(channels, classes, count):
    model = models.build("thin_resnet18", {}, (channels, 32, 32), classes, seed=0)
    assert sum(p.numel() for p in model.parameters()) == count


def test_a_models_weights_depend_on_its_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = models.build("small_cnn", {}, (1, 28, 28), 10, seed=5)
    torch.rand(3)
    two = models.build("small_cnn", {}, (1, 28, 28), 10, seed=5)
    other = models.build("small_cnn", {}, (1, 28, 28), 10, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    torch.manual_seed(1)
    models.build("small_cnn", {}, (1, 28, 28), 10, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "params", "shape", "message"),
    [
        (
            "resnet",
            {},
            (1, 28, 28),
            "there are thin_resnet18, small_cnn, mlp, and package.module:factory",
        ),
        ("torchvision.models:resnet", {}, (3, 32, 32), "torchvision.models:resnet does not make a model"),
        ("torchvision.models:resnet18", {"depth": 3}, (3, 32, 32), "unexpected keyword argument 'depth'"),
        ("torchvision.models:resnet18", {}, (1, 32, 32), "does not take images of 1 x 32 x 32"),
        ("torchvision.models:resnet18", {"num_classes": 7}, (3, 32, 32), "must return logits, 10 for each image"),
        ("collections:OrderedDict", {}, (3, 32, 32), "returned OrderedDict, not a torch.nn.Module"),
        ("torch.nn:Identity", {}, (1, 28, 28), "has no parameters"),
        ("mlp", {"widht": 3}, (1, 28, 28), "model.params.widht: unknown; mlp has width, depth"),
        ("mlp", {"width": "3"}, (1, 28, 28), "model.params.width: expected a whole number, got '3'"),
        ("mlp", {"depth": 0}, (1, 28, 28), "model.params.depth: should be from 1 to 1,000, got 0"),
        ("small_cnn", {}, (1, 4, 4), "images of 8 pixels or more"),
        ("mlp", {}, (1, 28, 20), "square images, got 28 x 20"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_line(name, params, shape, message):
    with pytest.raises(InputError) as caught:
        models.build(name, params, shape, 10, seed=0)
    assert message in str(caught.value)


def toy():
    """Two classes told apart by brightness."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 100, (40, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(40) % 2
    images[labels == 1] += 120
    return images, labels


def test_training_ends_at_the_target_and_says_so():
    images, labels = toy()
    model = models.build("mlp", {"width": 8}, (1, 8, 8), 2, seed=0)
    report = fit(model, images, labels, GRAY, stream(0, "order"), max_epochs=100, **SETTINGS)
    assert report.ended_by == "target"
    assert report.accuracy >= 0.99
    assert report.epochs < 100
    assert (predict(model, images, GRAY).argmax(-1) == labels).float().mean() >= 0.99


def test_training_ends_at_the_cap_and_says_so():
    images, labels = toy()
    model = models.build("mlp", {"width": 8}, (1, 8, 8), 2, seed=0)
    settings = SETTINGS | {"learning_rate": 1e-9}
    assert fit(model, images, labels, GRAY, stream(0, "order"), max_epochs=3, **settings)[::2] == (3, "cap")


def test_a_loss_that_is_no_number_is_an_error():
    images, labels = toy()
    model = models.build("mlp", {"width": 8}, (1, 8, 8), 2, seed=0)
    with pytest.raises(FloatingPointError, match="lower training.learning_rate"):
        fit(model, images, labels, GRAY, stream(0, "order"), max_epochs=50, **SETTINGS | {"learning_rate": 1e30})


class WithBatchNorm(torch.nn.Sequential):
    def __init__(self):
        super().__init__(
            *(torch.nn.Flatten(), torch.nn.LazyLinear(8), torch.nn.BatchNorm1d(8)),
            *(torch.nn.ReLU(), torch.nn.Linear(8, 2)),
        )


@pytest.mark.parametrize(("count", "batch_size"), [(33, 8), (33, 32), (1, 8), (5, 1)])
def test_a_single_image_at_the_end_of_an_epoch_does_not_stop_batch_norm(count, batch_size):
    images, labels = (part[:count] for part in toy())
    model = WithBatchNorm()
    report = fit(
        model, images, labels, GRAY, stream(0, "order"), max_epochs=30, **SETTINGS | {"batch_size": batch_size}
    )
    assert 0 <= report.accuracy <= 1
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


@pytest.mark.parametrize(("count", "size"), [(33, 8), (32, 8), (9, 4), (1, 8), (5, 1), (2, 1), (7, 100)])
def test_batches_hold_every_image_and_none_is_of_one(count, size):
    order = torch.randperm(count)
    batches = training._batches(order, size)
    assert min(map(len, batches)) > 1
    assert max(map(len, batches)) <= max(size + 1, 2)
    each_twice = count == 1 or size == 1
    assert torch.cat(batches).tolist() == (order.repeat_interleave(2) if each_twice else order).tolist()


def test_gradients_are_clamped():
    images, labels = toy()
    model = models.build("mlp", {"width": 8}, (1, 8, 8), 2, seed=0)
    fit(model, images, labels, GRAY, stream(0, "order"), max_epochs=1, **SETTINGS | {"clip": 1e-4})
    assert max(float(p.grad.abs().max()) for p in model.parameters()) <= 1e-4


def test_statistics_are_those_of_numpy_and_normalizing_uses_them():
    images = torch.randint(0, 256, (50, 3, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scaled = images.numpy() / 255
    found = channel_statistics(images)
    np.testing.assert_allclose(found.mean, scaled.mean((0, 2, 3)))
    np.testing.assert_allclose(found.std, scaled.std((0, 2, 3)))
    normal = normalize(images, found, torch.float64)
    assert normal.mean((0, 2, 3)).abs().max() < 1e-6
    torch.testing.assert_close(normal.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64))


def test_crop_and_flip_is_a_shift_of_the_padded_image_and_a_mirror():
    """Every result is one of the shifts and mirrors, and over many images all of them come up."""
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    padded = torch.nn.functional.pad(image, (CROP_PADDING,) * 4)[0, 0]
    allowed = {}
    for top in range(2 * CROP_PADDING + 1):
        for left in range(2 * CROP_PADDING + 1):
            crop = padded[top : top + 5, left : left + 5]
            for flip, view in ((0, crop), (1, crop.flip(1))):
                allowed.setdefault(tuple(view.flatten().tolist()), (top, left, flip))
    out = crop_and_flip(image.expand(3000, 1, 5, 5), torch.Generator().manual_seed(0))
    seen = {tuple(one.flatten().tolist()) for one in out}
    assert seen <= set(allowed)
    assert len(seen) > 0.95 * len(allowed)


def test_metrics_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(0, 4, (300,), generator=generator)
    predicted = torch.where(
        torch.rand(300, generator=generator) < 0.6, true, torch.randint(0, 3, (300,), generator=generator)
    )
    found = evaluate(predicted, true, 4)
    assert found.accuracy == pytest.approx(accuracy_score(true, predicted))
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(true, predicted))
    assert found.macro_f1 == pytest.approx(f1_score(true, predicted, average="macro"))
    assert found.recall == pytest.approx(recall_score(true, predicted, average=None).tolist())


def test_streams_differ_by_purpose_and_round_and_repeat():
    draws = [torch.rand(4, generator=stream(*key)) for key in [(0, "a", 0), (0, "b", 0), (0, "a", 1), (1, "a", 0)]]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert torch.equal(torch.rand(4, generator=stream(0, "a", 0)), draws[0])

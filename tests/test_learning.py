"""Models, factories, training, image statistics, metrics and random streams."""

import subprocess
import sys

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


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    model = models.build("small_cnn", {}, (1, 28, 28), 10, seed=5)
    torch.rand(3)
    equal_model = models.build("small_cnn", {}, (1, 28, 28), 10, seed=5)
    other_model = models.build("small_cnn", {}, (1, 28, 28), 10, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), equal_model.parameters(), strict=True))
    assert not torch.equal(next(model.parameters()), next(other_model.parameters()))
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
            "expected one of thin_resnet18, small_cnn, mlp, package.module:factory, or ./FILE.py",
        ),
        ("torchvision.models:resnet", {}, (3, 32, 32), "model.name: torchvision.models:resnet is not a function"),
        ("nowhere.models:make", {}, (3, 32, 32), "model.name: there is no module nowhere.models; install it"),
        ("nowhere:make", {}, (3, 32, 32), "name a file beside the sweep file as ./nowhere.py:make"),
        ("nowhere.py:make", {}, (3, 32, 32), "name a file beside the sweep file as ./nowhere.py:make"),
        ("./nowhere.py", {}, (3, 32, 32), "nowhere.py cannot be read"),
        ("./nowhere.py:make", {}, (3, 32, 32), "nowhere.py cannot be read (No such file or directory)"),
        ("torchvision.models:resnet18", {"depth": 3}, (3, 32, 32), "unexpected keyword argument 'depth'"),
        (
            "torchvision.models:resnet18",
            {},
            (1, 32, 32),
            "does not take images of 1 x 32 x 32; set data.channels to rgb",
        ),
        ("torchvision.models:resnet18", {"num_classes": 7}, (3, 32, 32), "must return logits, 10 for each image"),
        ("collections:OrderedDict", {}, (3, 32, 32), "returned OrderedDict, not a torch.nn.Module"),
        ("torch.nn:Identity", {}, (1, 28, 28), "has no parameters"),
        ("mlp", {"widht": 3}, (1, 28, 28), "model.params.widht: unknown key; there are width, depth"),
        ("mlp", {"width": "3"}, (1, 28, 28), "model.params.width: should be a valid integer, got '3'"),
        ("mlp", {"depth": 0}, (1, 28, 28), "model.params.depth: should be greater than or equal to 1, got 0"),
        ("small_cnn", {}, (1, 4, 4), "images of 8 pixels or more"),
        ("mlp", {}, (1, 28, 20), "square images, got 28 x 20"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused_with_the_setting(name, params, shape, message):
    with pytest.raises(InputError) as exception_info:
        models.build(name, params, shape, 10, seed=0)
    assert message in str(exception_info.value)


FACTORY_FILE = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn

@dataclass
class Sizes:
    hidden: int = 3

class Network(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, Sizes().hidden), nn.Linear(Sizes().hidden, num_classes))

    def forward(self, images):
        return self.layers(images)

def make(num_classes):
    return Network(num_classes)
"""


def test_a_factory_in_a_file_is_called_and_its_models_unpickle_without_the_file(tmp_path):
    """Ray pickles models for shards on machines that do not have the file."""
    from ray import cloudpickle

    file = tmp_path / "mymodels.py"
    file.write_text(FACTORY_FILE)
    model = models.build(f"{file}:make", {}, (1, 8, 8), 2, seed=0)
    content = cloudpickle.dumps(model)
    file.unlink()
    code = f"import pickle, torch; print(*pickle.loads({content!r})(torch.ones(1, 1, 8, 8)).flatten().tolist())"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [float(word) for word in process.stdout.split()] == model(torch.ones(1, 1, 8, 8)).flatten().tolist()


def make_toy_data():
    """Return images and labels of two classes that differ in brightness."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 100, (40, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(40) % 2
    images[labels == 1] += 120
    return images, labels


def test_training_ends_at_the_target_accuracy():
    images, labels = make_toy_data()
    model = models.build("mlp", {"width": 8}, (1, 8, 8), 2, seed=0)
    report = fit(model, images, labels, GRAY, stream(0, "order"), max_epochs=100, **SETTINGS)
    assert report.ended_by == "target"
    assert report.accuracy >= 0.99
    assert report.epochs < 100
    assert (predict(model, images, GRAY).argmax(-1) == labels).float().mean() >= 0.99


def test_training_ends_after_max_epochs():
    images, labels = make_toy_data()
    model = models.build("mlp", {"width": 8}, (1, 8, 8), 2, seed=0)
    settings = SETTINGS | {"learning_rate": 1e-9}
    assert fit(model, images, labels, GRAY, stream(0, "order"), max_epochs=3, **settings)[::2] == (3, "cap")


def test_an_infinite_loss_raises():
    images, labels = make_toy_data()
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
def test_batch_norm_trains_with_a_single_last_image(count, batch_size):
    images, labels = (part[:count] for part in make_toy_data())
    model = WithBatchNorm()
    report = fit(
        model, images, labels, GRAY, stream(0, "order"), max_epochs=30, **SETTINGS | {"batch_size": batch_size}
    )
    assert 0 <= report.accuracy <= 1
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


@pytest.mark.parametrize(("count", "size"), [(33, 8), (32, 8), (9, 4), (1, 8), (5, 1), (2, 1), (7, 100)])
def test_training_batches_cover_all_images_and_have_two_or_more(count, size):
    order = torch.randperm(count)
    batches = training._split_batches(order, size)
    assert min(map(len, batches)) > 1
    assert max(map(len, batches)) <= max(size + 1, 2)
    is_repeated = count == 1 or size == 1
    assert torch.cat(batches).tolist() == (order.repeat_interleave(2) if is_repeated else order).tolist()


def test_gradients_are_clipped_by_value():
    images, labels = make_toy_data()
    model = models.build("mlp", {"width": 8}, (1, 8, 8), 2, seed=0)
    fit(model, images, labels, GRAY, stream(0, "order"), max_epochs=1, **SETTINGS | {"clip": 1e-4})
    assert max(float(p.grad.abs().max()) for p in model.parameters()) <= 1e-4


def test_channel_statistics_equal_numpy_and_normalize_images():
    images = torch.randint(0, 256, (50, 3, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = images.numpy() / 255
    statistics = channel_statistics(images)
    np.testing.assert_allclose(statistics.mean, pixels.mean((0, 2, 3)))
    np.testing.assert_allclose(statistics.std, pixels.std((0, 2, 3)))
    normal = normalize(images, statistics, torch.float64)
    assert normal.mean((0, 2, 3)).abs().max() < 1e-6
    torch.testing.assert_close(normal.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64))


def test_crop_and_flip_draws_every_shift_and_flip_of_the_padded_image():
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    padded = torch.nn.functional.pad(image, (CROP_PADDING,) * 4)[0, 0]
    possible_images = {}
    for top in range(2 * CROP_PADDING + 1):
        for left in range(2 * CROP_PADDING + 1):
            crop = padded[top : top + 5, left : left + 5]
            for flip, view in ((0, crop), (1, crop.flip(1))):
                possible_images.setdefault(tuple(view.flatten().tolist()), (top, left, flip))
    augmented = crop_and_flip(image.expand(3000, 1, 5, 5), torch.Generator().manual_seed(0))
    augmented_images = {tuple(image.flatten().tolist()) for image in augmented}
    assert augmented_images <= set(possible_images)
    assert len(augmented_images) > 0.95 * len(possible_images)


def test_metrics_equal_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (300,), generator=generator)
    predicted = torch.where(
        torch.rand(300, generator=generator) < 0.6, labels, torch.randint(0, 3, (300,), generator=generator)
    )
    metrics = evaluate(predicted, labels, 4)
    assert metrics.accuracy == pytest.approx(accuracy_score(labels, predicted))
    assert metrics.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert metrics.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert metrics.recall == pytest.approx(recall_score(labels, predicted, average=None).tolist())


def test_random_streams_depend_on_seed_purpose_and_round():
    draws = [torch.rand(4, generator=stream(*key)) for key in [(0, "a", 0), (0, "b", 0), (0, "a", 1), (1, "a", 0)]]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert torch.equal(torch.rand(4, generator=stream(0, "a", 0)), draws[0])

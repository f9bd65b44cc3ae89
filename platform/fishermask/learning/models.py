"""Bundled models: thin ResNet-18 (arXiv 2411.05752), a small CNN and an MLP. Each ends in a linear layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fishermask.config import Config, parse
from fishermask.errors import InputError
from fishermask.guard import guarded, short
from fishermask.learning.factories import FORMS, call_factory, is_factory
from fishermask.tensors.verification import refuse_probabilities

MAX_DEPTH = 1000
MAX_WIDTH = 10**9
"""Maximum number of units in a layer: more than fit in memory, and few enough for the size of a tensor."""


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions (He et al. 2016)."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(images))


def thin_resnet18(channels: int, size: int, num_classes: int) -> nn.Module:
    """Thin ResNet-18 of arXiv 2411.05752: CIFAR stem, planes 16-32-64-128, 701,456 parameters for CIFAR-10."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for planes, stride in ((16, 1), (32, 2), (64, 2), (128, 2)):
        layers += [BasicBlock(width, planes, stride), BasicBlock(planes, planes, 1)]
        width = planes
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes, bias=False)]
    return nn.Sequential(*layers)


class SmallCNNParams(Config):
    """Parameters of ``small_cnn``."""

    width: int = Field(16, ge=1, le=MAX_WIDTH)
    """Channels of the first convolution. The other two have twice as many; the hidden layer has four times as many."""


def small_cnn(channels: int, size: int, num_classes: int, width: int = 16) -> nn.Module:
    """Small CNN for training on a CPU: three 3x3 convolutions with 2x2 max pooling, and one hidden layer."""
    if size < 8:
        raise InputError(f"model.name: small_cnn needs images of 8 pixels or more, got {size}; set data.image_size")
    side = size // 8
    return nn.Sequential(
        *(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(2 * width * side * side, 4 * width), nn.ReLU()),
        nn.Linear(4 * width, num_classes),
    )


class MLPParams(Config):
    """Parameters of ``mlp``."""

    width: int = Field(128, ge=1, le=MAX_WIDTH)
    """Units of each hidden layer."""
    depth: int = Field(2, ge=1, le=MAX_DEPTH)
    """Number of hidden layers."""


def mlp(channels: int, size: int, num_classes: int, width: int = 128, depth: int = 2) -> nn.Module:
    """Multilayer perceptron with ReLU activations."""
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = channels * size * size
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, num_classes))


class BundledModel(NamedTuple):
    """A model of this package."""

    function: Callable[..., nn.Module]
    """Called with the number of channels, the side of the square images, the number of classes and ``Params``."""
    Params: type[Config]


MODELS = {
    "thin_resnet18": BundledModel(thin_resnet18, Config),
    "small_cnn": BundledModel(small_cnn, SmallCNNParams),
    "mlp": BundledModel(mlp, MLPParams),
}


def describe(name: str) -> tuple[str, type[Config]]:
    """Return the description of a bundled model, and the class of its parameters."""
    model = MODELS[name]
    return (model.function.__doc__ or "").split("\n")[0], model.Params


def build(
    name: str, params: dict[str, Any], image_shape: tuple[int, int, int], num_classes: int, seed: int
) -> nn.Module:
    """Return a newly initialized model for images of ``image_shape`` (channels, height, width).

    The initial weights depend on ``seed`` only. The global random state is restored.

    Raises:
        InputError: the name or a parameter is not valid, or the user's factory fails.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_factory(name):
            return call_factory(name, params, image_shape, num_classes)
        with guarded("model.params", f"{name} with {short(params)} cannot be made"):
            return _build_bundled(name, params, image_shape, num_classes)


def _build_bundled(name: str, params: dict[str, Any], image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    channels, height, width = image_shape
    if name not in MODELS:
        expected = f"expected one of {', '.join(MODELS)}, {FORMS}"
        raise InputError(f"model.name: unknown model {short(name)}; {expected}")
    if height != width:
        raise InputError(f"model.name: {name} needs square images, got {height} x {width}; set data.image_size")
    model = MODELS[name]
    arguments = parse(model.Params, params, "model.params", name).model_dump()
    return model.function(channels, height, num_classes, **arguments)


def check_logits(model: nn.Module, images: Tensor, name: str) -> None:
    """Check that ``model``, in eval mode, returns finite logits for ``images`` [n, channels, height, width].

    Raises:
        InputError: the model raises an exception, or returns NaN, infinity or probabilities.
    """
    with guarded("model.name", f"{name} fails on the first images of the pool"), torch.no_grad():
        logits = model(images)
        if not logits.isfinite().all():
            raise InputError(f"model.name: {name} returns NaN or infinite logits in eval mode")
        refuse_probabilities(logits, f"model.name: {name}")


def parameter_bytes(name: str, params: dict[str, Any], image_shape: tuple[int, int, int], num_classes: int) -> int:
    """Return the size of a model's parameters without allocating them; 0 for a user's factory.

    Raises:
        InputError: the name or a parameter is not valid, or a layer has more parameters than a tensor can hold.
    """
    if is_factory(name):
        return 0
    with torch.device("meta"), guarded("model.params", f"{name} with {short(params)} cannot be made"):
        model = _build_bundled(name, params, image_shape, num_classes)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

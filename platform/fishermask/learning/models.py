"""The networks: thin ResNet-18 (arXiv 2411.05752), a small CNN for two cores, an MLP. Each ends in a linear layer."""

import inspect
import weakref
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishermask.errors import InputError
from fishermask.guard import guarded, short

MAX_DEPTH = 1000
"""Layers of an MLP."""
MAX_WIDTH = 10**9
"""Units of a layer: more than any memory holds, less than a tensor's size can count."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

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
    """ResNet-18 with a CIFAR stem, planes 16-32-64-128 and a head without bias: 701,456 parameters for CIFAR-10."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for planes, stride in ((16, 1), (32, 2), (64, 2), (128, 2)):
        layers += [BasicBlock(width, planes, stride), BasicBlock(planes, planes, 1)]
        width = planes
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes, bias=False)]
    return nn.Sequential(*layers)


def small_cnn(channels: int, size: int, num_classes: int, width: int = 16) -> nn.Module:
    """Three 3x3 convolutions, each followed by a 2x2 maximum, and one hidden layer of ``4 * width`` units."""
    if size < 8:
        raise InputError(f"model.name: small_cnn needs images of 8 pixels or more, got {size}; set data.image_size")
    _require("width", width, MAX_WIDTH)
    side = size // 8
    return nn.Sequential(
        *(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(2 * width * side * side, 4 * width), nn.ReLU()),
        nn.Linear(4 * width, num_classes),
    )


def mlp(channels: int, size: int, num_classes: int, width: int = 128, depth: int = 2) -> nn.Module:
    """``depth`` hidden layers of ``width`` rectified units."""
    _require("width", width, MAX_WIDTH)
    _require("depth", depth, MAX_DEPTH)
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = channels * size * size
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, num_classes))


def _require(key: str, value: int, largest: int) -> None:
    if not 1 <= value <= largest:
        raise InputError(f"model.params.{key}: should be from 1 to {largest:,}, got {short(value)}")


MODELS: dict[str, Callable[..., nn.Module]] = {
    "thin_resnet18": thin_resnet18,
    "small_cnn": small_cnn,
    "mlp": mlp,
}


def build(
    name: str, params: dict[str, Any], image_shape: tuple[int, int, int], num_classes: int, seed: int
) -> nn.Module:
    """A freshly initialized model for images of ``image_shape`` (channels, height, width).

    The global random state is left as it was: initial weights depend on ``seed`` alone.

    Raises:
        InputError: unknown name or parameter, or a parameter of the wrong type.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if ":" in name:
            return _foreign(name, params, image_shape, num_classes)
        with guarded("model.params", f"{name} with {short(params)} cannot be made"):
            return _own(name, params, image_shape, num_classes)


def _own(name: str, params: dict[str, Any], image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    channels, height, width = image_shape
    if name not in MODELS:
        ours = ", ".join(MODELS)
        raise InputError(f"model.name: unknown model {short(name)}; there are {ours}, and package.module:factory")
    if height != width:
        raise InputError(f"model.name: {name} needs square images, got {height} x {width}")
    allowed = list(inspect.signature(MODELS[name]).parameters)[3:]
    for key, value in params.items():
        if key not in allowed:
            raise InputError(f"model.params.{key}: unknown; {name} has {', '.join(allowed) or 'no parameters'}")
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"model.params.{key}: expected a whole number, got {short(value)}")
    return MODELS[name](channels, height, num_classes, **params)


def _foreign(name: str, params: dict[str, Any], image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the model that ``package.module:factory`` makes of ``params`` and the number of classes.

    Raises:
        InputError: the factory or the model's forward raises, or what they return cannot be trained.
    """
    place, _, factory = name.partition(":")
    if not place or not factory or place.startswith("."):
        raise InputError(f"model.name: {short(name)} names no factory; expected package.module:factory")
    with guarded("model.name", f"{name} does not make a model"):
        made = getattr(import_module(place), factory)(**{"num_classes": num_classes} | params)
    if not isinstance(made, nn.Module):
        raise InputError(f"model.name: {name} returned {type(made).__name__}, not a torch.nn.Module")
    shape = " x ".join(map(str, image_shape))
    with guarded("model.name", f"{name} does not take images of {shape}"):
        if made in _made:
            raise InputError(f"model.name: {name} returns a model that it returned before; make a new one in each call")
        _made.add(made)
        elsewhere = [key for key, value in [*made.named_parameters(), *made.named_buffers()] if _elsewhere(value)]
        if elsewhere:
            raise InputError(f"model.name: {name} has {elsewhere[0]} on another device; return the model on the CPU")
        with torch.no_grad():
            logits = made.eval()(torch.zeros(2, *image_shape))
        if not any(parameter.numel() for parameter in made.parameters()):
            raise InputError(f"model.name: {name} has no parameters; give a model that can be trained")
        if not any(parameter.requires_grad and parameter.numel() for parameter in made.parameters()):
            raise InputError(f"model.name: all parameters of {name} are frozen; set requires_grad of some of them")
        _check_kind(logits, name, num_classes)
    return made


_made: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that factories returned. One that is returned again would begin a round with trained weights."""


def _check_kind(logits: object, name: str, num_classes: int) -> None:
    """Raise ``InputError`` unless ``logits`` are two rows of floating-point numbers on the CPU."""
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"model.name: {name} must return logits, {num_classes} for each image; it returns {got}")
    if not logits.is_floating_point():
        raise InputError(f"model.name: {name} must return logits as floating-point numbers; it returns {logits.dtype}")
    if _elsewhere(logits):
        raise InputError(f"model.name: {name} must return logits on the device of its images; it uses {logits.device}")


def _elsewhere(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def check_logits(model: nn.Module, images: Tensor, name: str) -> None:
    """Check that ``model``, in eval mode, returns finite logits for ``images`` [n, channels, height, width].

    Raises:
        InputError: it raises, or returns NaN or infinity.
    """
    with guarded("model.name", f"{name} fails on the first images of the pool"), torch.no_grad():
        logits = model(images)
        if not logits.isfinite().all():
            raise InputError(f"model.name: {name} returns logits in eval mode that are NaN or infinite")


def parameter_bytes(name: str, params: dict[str, Any], image_shape: tuple[int, int, int], num_classes: int) -> int:
    """Return the bytes of a model's parameters without making them; 0 for a factory of the user's.

    Raises:
        InputError: as ``build``; or so many parameters that no tensor can hold them.
    """
    if ":" in name:
        return 0
    with torch.device("meta"), guarded("model.params", f"{name} with {short(params)} cannot be made"):
        model = _own(name, params, image_shape, num_classes)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

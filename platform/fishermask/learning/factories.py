"""Models from the user's code: ``package.module:factory``, or ``./FILE.py:factory`` for a file."""

import weakref
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fishermask.errors import InputError
from fishermask.guard import guarded, short
from fishermask.user_modules import attribute_of, import_file, split_file_name

FORMS = "package.module:factory, or ./FILE.py:factory for a file beside the sweep file"


def is_factory(name: str) -> bool:
    """Return whether a model's name refers to a factory, and not to a bundled model."""
    return ":" in name or split_file_name(name) is not None


def call_factory(name: str, params: dict[str, Any], image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the model that a factory makes from ``params`` and the number of classes, after checking the model.

    Raises:
        InputError: the factory or the model's forward raises an exception, or the model cannot be trained.
    """
    factory = _import_factory(name)
    with guarded("model.name", f"{name} does not make a model"):
        model = factory(**{"num_classes": num_classes} | params)
    if not isinstance(model, nn.Module):
        raise InputError(f"model.name: {name} returned {type(model).__name__}, not a torch.nn.Module")
    shape = " x ".join(map(str, image_shape))
    remedy = f"set data.channels to {'rgb' if image_shape[0] == 1 else 'gray'} if it expects other channels"
    with guarded("model.name", f"{name} does not take images of {shape}; {remedy}"):
        if model in _returned_models:
            raise InputError(f"model.name: {name} returned the same model twice; make a new one in each call")
        _returned_models.add(model)
        tensors = [*model.named_parameters(), *model.named_buffers()]
        if misplaced := [key for key, value in tensors if not _is_on_cpu(value)]:
            raise InputError(f"model.name: {name} has {misplaced[0]} on another device; return the model on the CPU")
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, *image_shape))
        if not any(parameter.numel() for parameter in model.parameters()):
            raise InputError(f"model.name: {name} has no parameters; give a model that can be trained")
        if not any(parameter.requires_grad and parameter.numel() for parameter in model.parameters()):
            raise InputError(f"model.name: all parameters of {name} are frozen; set requires_grad of some of them")
        _check_logits_type(logits, name, num_classes)
    return model


_returned_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that factories have returned. A factory that returned one again would start a round with trained weights."""


def _import_factory(name: str) -> Callable[..., object]:
    module: ModuleType | None
    if (parts := split_file_name(name)) is not None:
        file, factory = parts
        module = import_file(file, "model.name")
    else:
        source, _, factory = name.rpartition(":")
        module = _import_module(name, source) if source and not source.startswith(".") else None
    if module is None or not factory:
        raise InputError(f"model.name: {short(name)} is not the name of a factory; expected {FORMS}")
    with guarded("model.name", f"{name} cannot be imported"):
        function = attribute_of(module, factory, "model.name")
    if not callable(function):
        raise InputError(f"model.name: {name} is not a function")
    return function


def _import_module(name: str, source: str) -> ModuleType:
    try:
        with guarded("model.name", f"{name} cannot be imported"):
            return import_module(source)
    except InputError as error:
        if isinstance(error.__cause__, ModuleNotFoundError) and f"{source}.".startswith(f"{error.__cause__.name}."):
            file = f"./{source.removesuffix('.py')}.py:{name.rpartition(':')[2]}"
            remedy = f"install it, or name a file beside the sweep file as {file}"
            raise InputError(f"model.name: there is no module {source}; {remedy}", error.details) from None
        raise


def _check_logits_type(logits: object, name: str, num_classes: int) -> None:
    """Raise ``InputError`` unless ``logits`` are two rows of floating-point numbers on the CPU."""
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"model.name: {name} must return logits, {num_classes} for each image; it returns {got}")
    if not logits.is_floating_point():
        raise InputError(f"model.name: {name} must return logits as floating-point numbers; it returns {logits.dtype}")
    if not _is_on_cpu(logits):
        raise InputError(f"model.name: {name} must return logits on the device of its images; it uses {logits.device}")


def _is_on_cpu(value: object) -> bool:
    return not isinstance(value, Tensor) or value.device.type == "cpu"

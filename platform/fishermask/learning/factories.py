"""Models from the user's code: ``package.module:factory``, or ``path/to/file.py:factory``."""

import sys
import weakref
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fishermask.errors import InputError
from fishermask.guard import guarded, short
from fishermask.paths import require_file


def is_factory(name: str) -> bool:
    """Return whether a model's name refers to a factory, and not to a bundled model."""
    return ":" in name


def absolute_name(name: str, folder: Path) -> str:
    """Return the name of a factory in a file with an absolute path, and other names unchanged.

    Args:
        folder: folder that relative paths start from.
    """
    source, _, factory = name.rpartition(":")
    return f"{(folder / Path(source).expanduser()).resolve()}:{factory}" if source.endswith(".py") else name


def call_factory(name: str, params: dict[str, Any], image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the model that a factory makes from ``params`` and the number of classes, after checking it.

    Raises:
        InputError: the factory or the model's forward raises, or their results cannot be trained.
    """
    factory = _import_factory(name)
    with guarded("model.name", f"{name} does not make a model"):
        model = factory(**{"num_classes": num_classes} | params)
    if not isinstance(model, nn.Module):
        raise InputError(f"model.name: {name} returned {type(model).__name__}, not a torch.nn.Module")
    shape = " x ".join(map(str, image_shape))
    with guarded("model.name", f"{name} does not take images of {shape}"):
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
"""Models that factories returned. A model that is returned again would start a round with trained weights."""


def _import_factory(name: str) -> Callable[..., object]:
    source, _, factory = name.rpartition(":")
    if not source or not factory or source.startswith(".") and not source.endswith(".py"):
        expected = "package.module:factory or path/to/file.py:factory"
        raise InputError(f"model.name: {short(name)} is not the name of a factory; expected {expected}")
    if source.endswith(".py"):
        path = Path(source).expanduser().resolve()
        modified = require_file(path, "model.name").st_mtime_ns
        with guarded("model.name", f"{path} cannot be imported"):
            module = _load_file(path, modified)
    else:
        module = _import_module(source, factory)
    with guarded("model.name", f"{name} cannot be imported"):
        function = getattr(module, factory, None)
    if not callable(function):
        raise InputError(f"model.name: {source} has no function {short(factory)}")
    return function


def _import_module(source: str, factory: str) -> ModuleType:
    try:
        with guarded("model.name", f"{source} cannot be imported"):
            return import_module(source)
    except InputError as error:
        if isinstance(error.__cause__, ModuleNotFoundError) and error.__cause__.name == source:
            remedy = f"install it, or give the path of a file, such as ./{source}.py:{factory}"
            raise InputError(f"model.name: there is no module {short(source)}; {remedy}", error.details) from None
        raise


@lru_cache(maxsize=32)
def _load_file(path: Path, modified: int) -> ModuleType:
    """Return the module in the file ``path``, which is loaded again after the time ``modified`` has changed."""
    name = f"fishermask_model_file_{path.stem}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # for dataclasses, which look up the module that defines them
    try:
        spec.loader.exec_module(module)
    finally:
        # Ray sends classes of a module that is not listed by value, so workers do not need the file.
        del sys.modules[name]
    return module


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

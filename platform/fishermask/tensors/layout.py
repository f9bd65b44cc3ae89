"""Which of a model's gradients have a closed form: found out by looking at one forward pass.

A layer with a rule (``layer_rules``) that is called once, sample by sample, takes the fast way. Everything else, a raw
parameter, an attention layer, tied weights, a layer called twice, goes through ``torch.func``: slower, always right.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishermask.errors import InputError
from fishermask.tensors.kernels import plain_attention
from fishermask.tensors.layer_rules import has_rule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """How a model's parameters are differentiated."""

    head: str | None
    """Name of the linear layer whose output is the logits; None if there is none."""
    layers: tuple[str, ...]
    """Names of the layers, but for the head, that have a rule which applies."""
    slow: tuple[str, ...]
    """Names of the parameters, outside the head, that have not."""


def inspect(model: nn.Module, images: Tensor) -> Layout:
    """Look at a forward pass of ``images`` [n, ...] through ``model`` in eval mode.

    Raises:
        InputError: the model does not return logits [n, C], or mixes the samples of a batch.
    """
    calls: dict[str, list[tuple[Any, Any]]] = {}
    versions: dict[str, int] = {}

    def note(name: str, args: tuple[Any, ...], output: Any) -> None:
        calls.setdefault(name, []).append((args, output))
        if args and isinstance(args[0], Tensor):
            versions[name] = args[0]._version

    modules = {name: module for name, module in model.named_modules() if has_rule(module)}
    handles = [
        module.register_forward_hook(lambda _m, args, output, name=name: note(name, args, output))
        for name, module in modules.items()
    ]
    try:
        with torch.no_grad(), plain_attention:
            logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        raise InputError(f"model: {type(model).__name__} must return logits, one row an image and one column a class")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(f"model: layer {name} normalises by the batch itself, so samples see each other")

    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1

    def plain(name: str) -> bool:
        """Called once, with one tensor that has the samples first and is not overwritten, and parameters of its own."""
        if len(calls.get(name, [])) != 1:
            return False
        args, output = calls[name][0]
        tensors = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        if not tensors or len(args[0]) != len(images) or len(output) != len(images):
            return False
        own = all(holders[id(p)] == 1 for p in modules[name].parameters(recurse=False))
        return own and args[0]._version == versions[name]

    fast = [name for name in modules if plain(name)]
    heads = [
        n
        for n in fast
        if isinstance(modules[n], nn.Linear) and calls[n][0][1] is logits and calls[n][0][0][0].dim() == 2
    ]
    head = heads[0] if heads else None
    layers = tuple(name for name in fast if name != head)
    covered = {f"{layer}.{leaf}" for layer in fast for leaf, _ in modules[layer].named_parameters(recurse=False)}
    return Layout(head, layers, tuple(name for name, _ in model.named_parameters() if name not in covered))


@functools.cache
def announce_slow(names: tuple[str, ...]) -> None:
    """Say, once in a process, which parameters have no gradient rule."""
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        logger.warning("model: %d parameters have no gradient rule and take the slow way: %s", len(names), shown)


def per_sample_gradients(
    model: nn.Module, images: Tensor, names: tuple[str, ...], cotangent: Tensor, chunk: int = 16
) -> dict[str, Tensor]:
    """d(cotangent . logits) / d parameter for each image, by ``torch.func``: name -> [n, size of the parameter].

    ``chunk`` images are differentiated at once: each holds a gradient of all ``names``.
    """
    if not names:
        return {}
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    wanted = {name: parameters.pop(name) for name in names}

    def weighted(values: dict[str, Tensor], image: Tensor, weights: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, {**parameters, **values}, (image[None],))
        return (logits[0] * weights).sum()

    with plain_attention:
        rows = torch.func.vmap(torch.func.grad(weighted), in_dims=(None, 0, 0), chunk_size=chunk)(
            wanted, images, cotangent
        )
    return {name: value.flatten(1) for name, value in rows.items()}

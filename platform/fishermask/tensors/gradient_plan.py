"""Find how to differentiate a model by each of its parameters, from forward passes verified by autograd.

A layer with a rule (``layer_rules``) that is called once, sample by sample, takes the fast way. Everything else (a raw
parameter, an attention layer, tied weights, a layer called twice) is differentiated image by image, see
``slow_gradients``.

Then both are verified (``verification``): a few images' gradients by every parameter must be those of plain autograd,
in batches of two sizes. A layer that differs takes the slow way; a model that differs there is refused.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishermask.errors import InputError
from fishermask.tensors.backprop import by_sample
from fishermask.tensors.layer_rules import has_rule, own_parameters
from fishermask.tensors.runtime import plain_attention
from fishermask.tensors.slow_gradients import clear_caches, copy_model, logit_gradients
from fishermask.tensors.verification import (
    Batch,
    agreeing_layers,
    can_vectorize,
    check_logits,
    largest_entry,
    refuse_batch_statistics,
    refuse_closures,
    refuse_mixing,
)

logger = logging.getLogger(__name__)

VERIFICATION_SIZES = (2, 5)
"""Images in the two batches of the verification: no other axis of a layer's input is as long as both."""


@dataclass(frozen=True)
class GradientPlan:
    """How a model's parameters are differentiated."""

    head: str | None
    """Name of the linear layer whose output is the logits; None if there is none."""
    layers: tuple[str, ...]
    """Names of the layers, but for the head, that have a rule which applies."""
    slow: tuple[str, ...]
    """Names of the parameters, outside the head, that have not."""
    frozen: tuple[str, ...] = ()
    """Names of the parameters that are not trained: they do not count, and are never masked."""
    vectorized: bool = True
    """Whether ``slow`` can be differentiated for many images at once."""


def plan_gradients(model: nn.Module, images: Tensor) -> GradientPlan:
    """Find out how to differentiate ``model``, in eval mode, by each of its trained parameters, and verify it.

    Args:
        model: its parameters with ``requires_grad`` are the trained ones.
        images: some normalized images [m, ...] of the pool.

    Raises:
        InputError: no parameter is trained, or the model does not return finite logits [n, C], mixes the images of a
            batch, is random in eval mode, or has gradients that depend on the batch.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise InputError(
            f"model: all parameters of {type(model).__name__} are frozen; set requires_grad on those that are trained"
        )
    if odd := [name for name, parameter in model.named_parameters() if parameter.is_complex()]:
        raise InputError(f"model: parameter {odd[0]} is complex; only real parameters can be ranked and masked")
    refuse_batch_statistics(model)
    subject, seen = _examine(model, _different(images), trained)
    batches = [examined.batch for examined in seen]
    refuse_mixing(subject, batches)
    refuse_closures(model, subject, batches[0])
    clear_caches(subject)

    frozen = tuple(name for name, _ in subject.named_parameters() if name not in trained)
    layers = [layer for layer in seen[0].layers if layer in seen[1].layers]
    leaves = {layer: own_parameters(subject, layer) for layer in layers}
    layers = [layer for layer in layers if any(name in trained for name in leaves[layer])]
    slow = tuple(name for name in trained if name not in {name for layer in layers for name in leaves[layer]})
    head = seen[0].head
    if head != seen[1].head or head not in layers or any(name in frozen for name in leaves[head]):
        head = None  # a last layer that is partly frozen is a layer as any other: its columns are not all there
    return GradientPlan(
        head, tuple(layer for layer in layers if layer != head), slow, frozen, can_vectorize(subject, batches, slow)
    )


def _different(images: Tensor) -> Tensor:
    """Return different images, as many as the batches of ``VERIFICATION_SIZES`` hold together."""
    count = sum(VERIFICATION_SIZES)
    noise = torch.randn(count, *images.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    repeated = images[torch.arange(count, device=images.device) % len(images)]
    # Noise makes equal images different, and takes the ties out of maxima.
    return repeated + (0.1 * float(images.std(correction=0)) or 1.0) * noise.to(images)


class _Examined(NamedTuple):
    """What one batch says about a model."""

    batch: Batch
    layers: list[str]
    """Layers whose rule gives the gradients of plain autograd."""
    head: str | None
    """The linear layer whose output is the logits."""


def _examine(model: nn.Module, images: Tensor, trained: Sequence[str]) -> tuple[nn.Module, list[_Examined]]:
    """Return a copy of ``model``, in float64 if the model works in float64, and the results of each batch.

    The copy keeps side effects of forward passes away from ``model``.
    """

    def examine(subject: nn.Module, images: Tensor) -> tuple[nn.Module, list[_Examined]]:
        parts = zip(images.split(VERIFICATION_SIZES), (0, VERIFICATION_SIZES[1] // 2), strict=True)
        return subject, [_examine_batch(subject, part, row, trained) for part, row in parts]

    if images.dtype != torch.float64:
        try:
            return examine(copy_model(model).eval().double(), images.double())
        except InputError:
            raise
        except Exception as error:
            # Some models, and some devices, compute in one type only. Rounding then hides small mistakes.
            logger.debug("model: cannot be verified in float64: %s", error)
    return examine(copy_model(model).eval(), images)


def _examine_batch(model: nn.Module, images: Tensor, row: int, trained: Sequence[str]) -> _Examined:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    batch, candidates, head = _observe_batch(model, images, row, trained)
    model.requires_grad_(False)
    layers, plain_head = agreeing_layers(model, batch, candidates, head)
    for name in {name for layer in layers for name in own_parameters(model, layer)}:
        batch.gradients.pop(name, None)  # of a large model they take much memory
    return _Examined(batch, layers, head if plain_head else None)


def _observe_batch(
    model: nn.Module, images: Tensor, row: int, trained: Sequence[str]
) -> tuple[Batch, list[str], str | None]:
    """Run plain autograd on one batch; return its gradients, the layers whose rule may apply, and the last layer.

    A layer's rule may apply if it is called once, with one tensor that has the images first and is not overwritten, and
    if it shares no parameter.
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
    clear_caches(model)
    try:
        with torch.enable_grad(), plain_attention:
            logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    check_logits(model, logits, len(images))
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(logits.shape[1], generator=generator, dtype=torch.float64).to(logits)
    parameters = dict(model.named_parameters())
    gradients = logit_gradients(logits[row], [parameters[name] for name in trained], weights)
    clear_caches(model)

    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1

    def plain(name: str) -> bool:
        if len(calls.get(name, [])) != 1 or not by_sample(*calls[name][0], len(images)):
            return False
        unshared = all(holders[id(p)] == 1 for p in modules[name].parameters(recurse=False))
        return unshared and calls[name][0][0][0]._version == versions[name]

    layers = [name for name in modules if plain(name)]
    heads = [
        name
        for name in layers
        if isinstance(modules[name], nn.Linear) and calls[name][0][1] is logits and calls[name][0][0][0].dim() == 2
    ]
    largest = {name: largest_entry(gradient) for name, gradient in zip(trained, gradients, strict=True)}
    least = 1e-4 * max(largest.values())
    batch = Batch(
        images,
        row,
        weights,
        logits.detach(),
        dict(zip(trained, gradients, strict=True)),
        {name: max(value, least) for name, value in largest.items()},
    )
    return batch, layers, heads[0] if heads else None


@functools.cache
def warn_about_slow_parameters(names: tuple[str, ...]) -> None:
    """Say, once in a process, which parameters have no gradient rule."""
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        logger.warning("model: %d parameters have no gradient rule and take the slow way: %s", len(names), shown)

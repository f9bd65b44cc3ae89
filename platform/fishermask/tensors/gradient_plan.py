"""The choice of how to compute gradients with respect to each parameter of a model, verified with plain autograd.

If a layer has a gradient rule (``layer_rules``) and is called once, with all images, its rule gives the gradients. For
all other parameters (of attention layers, tied weights, layers called twice), ``slow_gradients`` computes the gradients
image by image.

Both ways are verified (``verification``): for a few images, in batches of two sizes, the gradients with respect to
every parameter must equal those of plain autograd. If the rule of a layer fails, its gradients are computed image by
image. If these fail too, the model is refused.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishermask.errors import InputError
from fishermask.tensors.backprop import is_per_sample
from fishermask.tensors.layer_rules import direct_parameters, has_rule
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
"""Sizes of the two batches of the verification. They differ, so that only the batch dimension can have both sizes."""


@dataclass(frozen=True)
class GradientPlan:
    """How gradients with respect to each parameter of a model are computed."""

    head: str | None
    """Name of the last layer, the linear layer whose output is the logits; None if the model has none."""
    layers: tuple[str, ...]
    """Names of the other layers whose gradient rule passed the verification."""
    slow: tuple[str, ...]
    """Names of all other trained parameters; their gradients are computed image by image."""
    frozen: tuple[str, ...] = ()
    """Names of the parameters that are not trained: they are never masked, and sizes of masks do not count them."""
    vectorized: bool = True
    """Whether ``vmap`` gives correct gradients with respect to ``slow``."""


def plan_gradients(model: nn.Module, images: Tensor) -> GradientPlan:
    """Return how to compute the gradients of ``model``, in eval mode, with respect to each trained parameter.

    Args:
        model: its trained parameters are those with ``requires_grad``.
        images: model inputs of a few images of the pool, [m, ...].

    Raises:
        InputError: no parameter is trained, or the model does not return finite logits [n, C], mixes the images of a
            batch, is random in eval mode, or has no gradients or gradients that depend on the batch.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise InputError(
            f"model: all parameters of {type(model).__name__} are frozen; set requires_grad of the trained ones"
        )
    if complex_names := [name for name, parameter in model.named_parameters() if parameter.is_complex()]:
        raise InputError(
            f"model: parameter {complex_names[0]} is complex; only real parameters can be ranked and masked"
        )
    refuse_batch_statistics(model)
    subject, results = _examine(model, _make_distinct(images), trained)
    batches = [result.batch for result in results]
    refuse_mixing(subject, batches)
    refuse_closures(model, subject, batches[0])
    clear_caches(subject)

    frozen = tuple(name for name, _ in subject.named_parameters() if name not in trained)
    layers = [layer for layer in results[0].layers if layer in results[1].layers]
    leaves = {layer: direct_parameters(subject, layer) for layer in layers}
    layers = [layer for layer in layers if any(name in trained for name in leaves[layer])]
    slow = tuple(name for name in trained if name not in {name for layer in layers for name in leaves[layer]})
    head = results[0].head
    if head != results[1].head or head not in layers or any(name in frozen for name in leaves[head]):
        head = None  # a partly frozen last layer lacks columns, so it is treated as part of the body
    return GradientPlan(
        head, tuple(layer for layer in layers if layer != head), slow, frozen, can_vectorize(subject, batches, slow)
    )


def _make_distinct(images: Tensor) -> Tensor:
    """Return distinct inputs for all batches of ``VERIFICATION_SIZES``: ``images``, repeated and with noise."""
    count = sum(VERIFICATION_SIZES)
    noise = torch.randn(count, *images.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    repeated = images[torch.arange(count, device=images.device) % len(images)]
    # Noise makes equal images distinct and breaks ties in max pooling.
    return repeated + (0.1 * float(images.std(correction=0)) or 1.0) * noise.to(images)


class _BatchResult(NamedTuple):
    """Results of the verification of a model on one batch."""

    batch: Batch
    layers: list[str]
    """Layers whose gradient rule agrees with plain autograd."""
    head: str | None
    """The linear layer whose output is the logits."""


def _examine(model: nn.Module, images: Tensor, trained: Sequence[str]) -> tuple[nn.Module, list[_BatchResult]]:
    """Verify a copy of ``model``. Return the copy, in float64 if the model supports it, and the results of each batch.

    Forward passes of the copy have no side effects on ``model``.
    """

    def examine(subject: nn.Module, images: Tensor) -> tuple[nn.Module, list[_BatchResult]]:
        parts = zip(images.split(VERIFICATION_SIZES), (0, VERIFICATION_SIZES[1] // 2), strict=True)
        return subject, [_examine_batch(subject, part, row, trained) for part, row in parts]

    if images.dtype != torch.float64:
        try:
            return examine(copy_model(model).eval().double(), images.double())
        except InputError:
            raise
        except Exception as error:
            # Some models and devices do not support float64. In their own type, rounding may hide small differences.
            logger.debug("model: cannot be verified in float64: %s", error)
    return examine(copy_model(model).eval(), images)


def _examine_batch(model: nn.Module, images: Tensor, row: int, trained: Sequence[str]) -> _BatchResult:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    batch, candidates, head = _observe_batch(model, images, row, trained)
    model.requires_grad_(False)
    layers, plain_head = agreeing_layers(model, batch, candidates, head)
    for name in {name for layer in layers for name in direct_parameters(model, layer)}:
        batch.gradients.pop(name, None)  # to free memory
    return _BatchResult(batch, layers, head if plain_head else None)


def _observe_batch(
    model: nn.Module, images: Tensor, row: int, trained: Sequence[str]
) -> tuple[Batch, list[str], str | None]:
    """Run plain autograd on one batch. Return the batch, the layers whose rule may apply, and the last layer.

    The rule of a layer may apply if the layer is called once, its only argument is a tensor [n, ...] that is not
    overwritten later, and it shares no parameter with another layer.
    """
    calls: dict[str, list[tuple[Any, Any]]] = {}
    versions: dict[str, int] = {}

    def record(name: str, args: tuple[Any, ...], output: Any) -> None:
        calls.setdefault(name, []).append((args, output))
        if args and isinstance(args[0], Tensor):
            versions[name] = args[0]._version

    modules = {name: module for name, module in model.named_modules() if has_rule(module)}
    handles = [
        module.register_forward_hook(lambda _m, args, output, name=name: record(name, args, output))
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
    if not logits.requires_grad:
        raise InputError(
            "model: its logits do not depend on its trained parameters by autograd; remove detach() or "
            "torch.no_grad() from forward"
        )
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(logits.shape[1], generator=generator, dtype=torch.float64).to(logits)
    parameters = dict(model.named_parameters())
    gradients = logit_gradients(logits[row], [parameters[name] for name in trained], weights)
    clear_caches(model)

    num_holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        num_holders[id(parameter)] = num_holders.get(id(parameter), 0) + 1

    def may_have_rule(name: str) -> bool:
        if len(calls.get(name, [])) != 1 or not is_per_sample(*calls[name][0], len(images)):
            return False
        unshared = all(num_holders[id(p)] == 1 for p in modules[name].parameters(recurse=False))
        return unshared and calls[name][0][0][0]._version == versions[name]

    layers = [name for name in modules if may_have_rule(name)]
    heads = [
        name
        for name in layers
        if isinstance(modules[name], nn.Linear) and calls[name][0][1] is logits and calls[name][0][0][0].dim() == 2
    ]
    largest = {name: largest_entry(gradient) for name, gradient in zip(trained, gradients, strict=True)}
    smallest_scale = 1e-4 * max(largest.values())
    batch = Batch(
        images,
        row,
        weights,
        logits.detach(),
        dict(zip(trained, gradients, strict=True)),
        {name: max(value, smallest_scale) for name, value in largest.items()},
    )
    return batch, layers, heads[0] if heads else None


@functools.cache
def warn_about_slow_parameters(names: tuple[str, ...]) -> None:
    """Warn about parameters without a gradient rule, once per process."""
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        logger.warning(
            "model: %d parameters have no gradient rule and are differentiated image by image, which is slow: %s",
            len(names),
            shown,
        )

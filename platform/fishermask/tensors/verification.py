"""Whether rules, ``vmap`` and copies give the gradients of a model that plain autograd gives, on a few images.

No rule can know what else a model does with a layer: it may read the weight elsewhere, replace ``forward``, or change
inputs and outputs in hooks. So a few images' gradients by every parameter are compared with those of plain autograd.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishermask.errors import InputError
from fishermask.tensors.backprop import forward, output_gradients
from fishermask.tensors.layer_rules import own_parameters, sample_gradients, split_name
from fishermask.tensors.runtime import plain_attention
from fishermask.tensors.slow_gradients import clear_caches, slow_gradients

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
"""Largest difference of two gradients, as a share of the largest entry, that is taken for rounding."""


@dataclass(frozen=True)
class Batch:
    """Images, a random cotangent for one of them, and the gradients that plain autograd gives for it."""

    images: Tensor
    row: int
    weights: Tensor
    """[C]"""
    logits: Tensor
    """[n, C]"""
    gradients: dict[str, Tensor]
    """Parameter name -> gradient of ``weights . logits[row]``; gradients that a rule also gives are
    dropped."""
    scales: Mapping[str, float]
    """Parameter name -> the largest entry of its gradient, at least 1e-4 of the largest of all parameters."""

    def cotangents(self) -> Tensor:
        """[1, n, C], zero but for the row."""
        values = self.weights.new_zeros(1, len(self.images), len(self.weights))
        values[0, self.row] = self.weights
        return values


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise ``InputError`` if a batch norm layer has no running statistics."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(f"model: layer {name} normalizes by the batch itself, so images affect each other")


def check_logits(model: nn.Module, logits: Any, count: int) -> None:
    """Raise ``InputError`` if ``logits`` are not finite floating-point numbers [count, C]."""
    name = type(model).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count:
        raise InputError(f"model: {name} must return logits, one row an image and one column a class")
    if not logits.is_floating_point():
        raise InputError(f"model: {name} must return floating-point logits, got {logits.dtype}")
    if not logits.isfinite().all():
        raise InputError(f"model: {name} returns logits in eval mode that are not finite")


def refuse_mixing(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Raise ``InputError`` if the logits of an image depend on its batch, or differ between two passes."""
    first, second = batches
    with torch.no_grad(), plain_attention:
        moved = model(torch.stack([second.images[0], first.images[0]]))
        if _close(moved, torch.stack([second.logits[0], first.logits[0]])):
            return
        again = model(first.images)
    if not _close(again, first.logits):
        raise InputError(
            f"model: {type(model).__name__} is random in eval mode: the same images gave different logits the second "
            "time; switch off what stays random, for instance dropout that ignores self.training"
        )
    raise InputError(
        f"model: {type(model).__name__} mixes the images of a batch: the logits of an image changed with the "
        "others in its batch; each image must be treated alone in eval mode"
    )


def refuse_closures(original: nn.Module, subject: nn.Module, batch: Batch) -> None:
    """Raise ``InputError`` if the logits of ``subject``, a copy of ``original``, change with the original's parameters.

    A function that the model holds, such as a lambda over ``self``, is not copied with it and reads the original.
    """
    before = [(parameter, parameter.detach().clone()) for parameter in original.parameters()]
    clear_caches(subject)
    try:
        with torch.no_grad(), plain_attention:
            for parameter, _ in before:
                parameter.mul_(1.5).add_(0.1)
            logits = subject(batch.images)
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
    if not _close(logits, batch.logits):
        raise InputError(
            f"model: {type(original).__name__} holds a function that reads the model it was made for, such as a lambda "
            "or a hook over self, and a copy of the model would read it too; use a method, or the hook's own argument"
        )


def agreeing_layers(model: nn.Module, batch: Batch, layers: Sequence[str], head: str | None) -> tuple[list[str], bool]:
    """Return the layers whose rule gives the gradients of plain autograd for one image, and zero for the other images.

    Also return whether the logits are the unchanged output of ``head``.
    """
    try:
        run = forward(model, batch.images, None, layers)
        (gradients,) = output_gradients(run, batch.cotangents())
        reversed_run = forward(model, batch.images.flip(0), None, layers)
    except Exception as error:
        # Under gradient checkpointing, for one, a layer's output cannot be differentiated by: no rule applies.
        logger.debug("model: no gradient rule applies: %s", error)
        return [], False
    if not _close(run.logits.detach(), batch.logits):
        return [], False
    layers_that_agree = [
        layer
        for layer in layers
        if layer not in run.irregular + reversed_run.irregular
        # A model may sort its images and put them in order again at the end.
        and _close(reversed_run.inputs[layer].flip(0), run.inputs[layer])
        and _agrees(model, layer, run.inputs[layer], gradients[layer], batch)
    ]
    return layers_that_agree, head in gradients and _close(gradients[head], batch.cotangents()[0])


def _agrees(model: nn.Module, layer: str, given: Tensor, gradient: Tensor, batch: Batch) -> bool:
    for i in range(len(batch.images)):
        if i != batch.row and not gradient[i].any():
            continue  # the cotangent of one image does not reach this one
        rows = sample_gradients(model.get_submodule(layer), given[i : i + 1], gradient[i : i + 1])
        for name in own_parameters(model, layer):
            if name not in batch.gradients:
                continue  # it is frozen
            difference = rows[split_name(name)[1]]
            if i == batch.row:
                difference = difference.sub_(batch.gradients[name].reshape(difference.shape))
            if largest_entry(difference) > TOLERANCE.get(difference.dtype, 0.05) * batch.scales[name]:
                return False
    return True


def can_vectorize(model: nn.Module, batches: Sequence[Batch], slow: Sequence[str]) -> bool:
    """Return whether ``vmap`` gives the gradients of plain autograd by the parameters ``slow``. If not, the loop must.

    Raises:
        InputError: the loop does not give them either.
    """
    images = torch.stack([batch.images[batch.row] for batch in batches])
    cotangents = torch.stack([batch.weights for batch in batches])[None]

    def first_wrong(vectorized: bool) -> str | None:
        # One image at a time, to notice a pass that changes the model for the next one.
        for _, part, gradients in slow_gradients(model, images, slow, cotangents, vectorized, chunk=1):
            batch = batches[part.start]
            for name, gradient in gradients.items():
                expected = batch.gradients.get(name)  # none if a rule gave it for this batch, though not for the other
                if expected is not None and not _close(gradient.reshape(expected.shape), expected, batch.scales[name]):
                    return name
        return None

    try:
        if first_wrong(vectorized=True) is None:
            return True
    except Exception as error:
        # vmap has no rule for recurrent layers, nor for control flow that depends on the data, and more.
        logger.debug("model: vmap cannot differentiate it: %s", error)
    if (name := first_wrong(vectorized=False)) is not None:
        raise InputError(
            f"model: the gradient of one image by {name} depends on the other images of its batch, or on earlier "
            "batches; each image must be treated alone in eval mode"
        )
    return False


def _close(actual: Tensor, expected: Tensor, scale: float | None = None) -> bool:
    """Return whether two tensors agree up to rounding, relative to ``scale`` or the largest entry of ``expected``."""
    scale = largest_entry(expected) if scale is None else scale
    return largest_entry(actual - expected) <= TOLERANCE.get(expected.dtype, 0.05) * scale


def largest_entry(values: Tensor) -> float:
    """Return the largest absolute value; 0 for an empty tensor."""
    return float(torch.linalg.vector_norm(values, torch.inf)) if values.numel() else 0.0

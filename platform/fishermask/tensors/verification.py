"""Verification that gradient rules, ``vmap`` and copies of a model give the gradients of plain autograd.

A gradient rule cannot know what else a model does with a layer: the model may read the weight elsewhere, replace
``forward``, or change inputs and outputs in hooks. So the gradients of a few images with respect to every parameter are
compared with plain autograd.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishermask.errors import InputError
from fishermask.tensors.backprop import forward, output_gradients
from fishermask.tensors.layer_rules import direct_parameters, sample_gradients, split_name
from fishermask.tensors.runtime import plain_attention
from fishermask.tensors.slow_gradients import clear_caches, copy_model, slow_gradients

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
"""Largest difference between two gradients, relative to their largest entry, that rounding may cause."""


@dataclass(frozen=True)
class Batch:
    """Images, a random cotangent for one of these images, and the gradients of this image by plain autograd."""

    images: Tensor
    """Model inputs, [n, ...]."""
    row: int
    """Index of the image whose gradients are compared."""
    weights: Tensor
    """Cotangent of the image, [C]."""
    logits: Tensor
    """[n, C]"""
    gradients: dict[str, Tensor]
    """Parameter name -> gradient of ``(weights * logits[row]).sum()``; parameters with a verified rule are removed."""
    scales: Mapping[str, float]
    """Parameter name -> the largest entry of its gradient, at least 1e-4 of the largest entry of all gradients."""

    def cotangents(self) -> Tensor:
        """Return cotangents [1, n, C] with ``weights`` at ``row`` and zero elsewhere."""
        values = self.weights.new_zeros(1, len(self.images), len(self.weights))
        values[0, self.row] = self.weights
        return values


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise ``InputError`` if a batch norm layer has no running statistics."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(f"model: layer {name} normalizes by the batch itself; set track_running_stats to True")


def check_logits(model: nn.Module, logits: Any, count: int) -> None:
    """Raise ``InputError`` if ``logits`` are not finite floating-point numbers [count, C] with at least two classes."""
    name = type(model).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count:
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        if isinstance(logits, Mapping):
            got += f" with the keys {', '.join(map(str, logits))}"
        raise InputError(
            f"model: {name} must return logits [{count}, C], a row per image and a column per class, and returned "
            f"{got}; wrap it in a module whose forward returns the logits"
        )
    if logits.shape[1] < 2:
        raise InputError(
            f"model: {name} returns {logits.shape[1]} logit; a binary classifier needs 2, such as "
            "stack([-z / 2, z / 2], 1)"
        )
    if not logits.is_floating_point():
        raise InputError(f"model: {name} must return floating-point logits, got {logits.dtype}")
    if not logits.isfinite().all():
        raise InputError(
            f"model: {name} returns logits that are not finite in eval mode; check its parameters and inputs"
        )
    refuse_probabilities(logits, f"model: {name}")


def refuse_probabilities(logits: Tensor, name: str) -> None:
    """Raise ``InputError`` if all rows of ``logits`` [n, C] are probabilities; queries would apply a second softmax."""
    if len(logits) and bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() <= 1e-5).all()):
        raise InputError(f"{name} returns probabilities; return logits, without softmax")


def refuse_mixing(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Raise ``InputError`` if the logits of an image depend on its batch, or differ between two passes."""
    first, second = batches
    with torch.no_grad(), plain_attention:
        mixed = model(torch.stack([second.images[0], first.images[0]]))
        if _is_close(mixed, torch.stack([second.logits[0], first.logits[0]])):
            return
        repeated = model(first.images)
    if not _is_close(repeated, first.logits):
        raise InputError(
            f"model: {type(model).__name__} is random in eval mode: the same images gave different logits in two "
            "passes; switch off all randomness, for example dropout that ignores self.training"
        )
    raise InputError(
        f"model: {type(model).__name__} mixes the images of a batch: the logits of an image changed with the "
        "other images; in eval mode they must depend on this image only"
    )


def refuse_references(original: nn.Module, subject: nn.Module, images: Tensor) -> None:
    """Raise ``InputError`` if autograd finds that the logits of ``subject``, a copy, depend on ``original``.

    ``refuse_closures`` cannot detect this if the verified model is itself a copy of the user's model.
    """
    trained = [parameter for parameter in original.parameters() if parameter.requires_grad]
    subject = copy_model(subject).requires_grad_(False)
    with torch.enable_grad(), plain_attention:
        logits = subject(images.clone())
    if not trained or not isinstance(logits, Tensor) or not logits.requires_grad:
        return
    gradients = torch.autograd.grad(logits, trained, torch.ones_like(logits), allow_unused=True)
    if any(gradient is not None for gradient in gradients):
        raise _closure_error(original)


def refuse_closures(original: nn.Module, subject: nn.Module, batch: Batch) -> None:
    """Raise ``InputError`` if the logits of ``subject``, a copy of ``original``, change with the original's parameters.

    A function stored in the model, such as a lambda over ``self``, is not copied with it and reads the original.
    """
    saved_values = [(parameter, parameter.detach().clone()) for parameter in original.parameters()]
    clear_caches(subject)
    try:
        with torch.no_grad(), plain_attention:
            for parameter, _ in saved_values:
                parameter.mul_(1.5).add_(0.1)
            logits = subject(batch.images)
    finally:
        with torch.no_grad():
            for parameter, value in saved_values:
                parameter.copy_(value)
    if not _is_close(logits, batch.logits):
        raise _closure_error(original)


def _closure_error(original: nn.Module) -> InputError:
    return InputError(
        f"model: {type(original).__name__} holds a function that refers to the model itself, such as a lambda or a "
        "hook over self, and a copy of the model would still use the original; use a method, or the hook's argument"
    )


def agreeing_layers(model: nn.Module, batch: Batch, layers: Sequence[str], head: str | None) -> tuple[list[str], bool]:
    """Return the layers whose rule gives the gradients of plain autograd, and whether ``head`` is the last layer.

    A rule must give the same gradients for the image ``batch.row``, and zero for the other images. ``head`` is the last
    layer if the logits are its unchanged output.
    """
    try:
        forward_pass = forward(model, batch.images, None, layers)
        (gradients,) = output_gradients(forward_pass, batch.cotangents())
        reversed_pass = forward(model, batch.images.flip(0), None, layers)
    except Exception as error:
        # With gradient checkpointing, for example, autograd has no gradient with respect to the output of a layer.
        logger.debug("model: no gradient rule applies: %s", error)
        return [], False
    if not _is_close(forward_pass.logits.detach(), batch.logits):
        return [], False
    layers_that_agree = [
        layer
        for layer in layers
        if layer not in forward_pass.irregular + reversed_pass.irregular
        # A model may sort its images and restore their order at the end.
        and _is_close(reversed_pass.inputs[layer].flip(0), forward_pass.inputs[layer])
        and _agrees(model, layer, forward_pass.inputs[layer], gradients[layer], batch)
    ]
    return layers_that_agree, head in gradients and _is_close(gradients[head], batch.cotangents()[0])


def _agrees(model: nn.Module, layer: str, inputs: Tensor, gradient: Tensor, batch: Batch) -> bool:
    """Return whether the rule of a layer gives the gradients of ``batch``."""
    for i in range(len(batch.images)):
        if i != batch.row and not gradient[i].any():
            continue  # the rule gives zero, as it must for the other images
        rows = sample_gradients(model.get_submodule(layer), inputs[i : i + 1], gradient[i : i + 1])
        for name in direct_parameters(model, layer):
            if name not in batch.gradients:
                continue  # frozen
            difference = rows[split_name(name)[1]]
            if i == batch.row:
                difference = difference.sub_(batch.gradients[name].reshape(difference.shape))
            if largest_entry(difference) > TOLERANCE.get(difference.dtype, 0.05) * batch.scales[name]:
                return False
    return True


def can_vectorize(model: nn.Module, batches: Sequence[Batch], slow: Sequence[str]) -> bool:
    """Return whether ``vmap`` gives the gradients of plain autograd with respect to the parameters ``slow``.

    Raises:
        InputError: neither ``vmap`` nor the loop over images gives these gradients.
    """
    images = torch.stack([batch.images[batch.row] for batch in batches])
    cotangents = torch.stack([batch.weights for batch in batches])[None]

    def find_difference(vectorized: bool) -> str | None:
        """Return the name of a parameter whose gradients differ; None if all agree."""
        # One image at a time, to detect a forward pass that changes the model for the next pass.
        for _, part, gradients in slow_gradients(model, images, slow, cotangents, vectorized, chunk=1):
            batch = batches[part.start]
            for name, gradient in gradients.items():
                expected = batch.gradients.get(name)  # None if a rule passed on this batch, but not on the other batch
                if expected is not None and not _is_close(
                    gradient.reshape(expected.shape), expected, batch.scales[name]
                ):
                    return name
        return None

    try:
        if find_difference(vectorized=True) is None:
            return True
    except Exception as error:
        # For example, vmap supports neither recurrent layers nor control flow that depends on the data.
        logger.debug("model: vmap cannot differentiate it: %s", error)
    if (name := find_difference(vectorized=False)) is not None:
        raise InputError(
            f"model: the gradient of one image with respect to {name} depends on the other images of its batch, or on "
            "earlier batches; in eval mode it must depend on this image only"
        )
    return False


def _is_close(actual: Tensor, expected: Tensor, scale: float | None = None) -> bool:
    """Return whether two tensors agree up to rounding, relative to ``scale`` or the largest entry of ``expected``."""
    scale = largest_entry(expected) if scale is None else scale
    return largest_entry(actual - expected) <= TOLERANCE.get(expected.dtype, 0.05) * scale


def largest_entry(values: Tensor) -> float:
    """Return the largest absolute value; 0 for an empty tensor."""
    return float(torch.linalg.vector_norm(values, torch.inf)) if values.numel() else 0.0

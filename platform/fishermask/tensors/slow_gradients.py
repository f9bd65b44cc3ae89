"""Gradients of single images with respect to any parameter, by ``torch.func.vmap`` or by a loop over images.

The loop makes one forward pass per image. It also works if ``vmap`` has no rule for a layer (recurrent layers), if the
control flow depends on the data (mixtures of experts), and with gradient checkpointing.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fishermask.tensors.runtime import plain_attention

CHUNK = 16
"""Number of images that ``vmap`` differentiates at once. Each image takes memory for all its gradients."""


def slow_gradients(
    model: nn.Module,
    images: Tensor,
    names: Sequence[str],
    cotangents: Tensor,
    vectorized: bool = True,
    chunk: int = CHUNK,
) -> Iterator[tuple[int, slice, dict[str, Tensor]]]:
    """Compute the gradients of ``(cotangent * logits).sum()`` with respect to parameters, for each image and cotangent.

    Args:
        images: [n, ...]
        names: names of the parameters.
        cotangents: [r, n, C]
        vectorized: whether to use ``vmap``.
        chunk: number of images that ``vmap`` differentiates at once.

    Yields:
        Index of the cotangent, a slice of the images [m], and parameter name -> gradients [m, size of the parameter].
    """
    if names:
        by_vmap = vectorized and _by_vmap(model, images, names, cotangents, chunk)
        yield from by_vmap or _by_loop(model, images, names, cotangents)


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy. Tensors with an autograd graph, which weight norm stores, are copied without it."""
    derived_tensors = [
        leaf
        for module in model.modules()
        for leaf in tree_leaves(vars(module))
        if isinstance(leaf, Tensor) and not leaf.is_leaf
    ]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in derived_tensors})


def clear_caches(model: nn.Module) -> None:
    """Clear what a model in eval mode caches, by switching to training mode and back.

    LeViT, for example, caches attention biases without their gradients in eval mode, and clears them in training mode.
    """
    model.train()
    model.eval()


def pair(images: Tensor) -> Tensor:
    """Return ``images`` [n, ...] if n > 1, otherwise the single image twice.

    The backward pass of batch norm in eval mode is wrong for one image with a transposed gradient (docs/method.md,
    section 2), so a single image is never differentiated alone.
    """
    return images if len(images) > 1 else torch.cat([images, images])


def _by_vmap(
    model: nn.Module, images: Tensor, names: Sequence[str], cotangents: Tensor, chunk: int
) -> Iterator[tuple[int, slice, dict[str, Tensor]]]:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    differentiated = {name: parameters.pop(name) for name in names}

    def weighted_logit(values: dict[str, Tensor], image: Tensor, weights: Tensor) -> Tensor:
        clear_caches(model)
        logits = torch.func.functional_call(model, {**parameters, **values}, (image[None],))
        return (logits[0] * weights).sum()

    gradients = torch.func.vmap(torch.func.grad(weighted_logit), in_dims=(None, 0, 0))
    # ``functional_call`` changes some models with tied weights.
    saved_parameters = [(module, key, value) for module in model.modules() for key, value in module._parameters.items()]
    try:
        for r, cotangent in enumerate(cotangents):
            for first in range(0, len(images), chunk):
                part = slice(first, min(first + chunk, len(images)))
                count = part.stop - part.start
                with plain_attention:
                    rows = gradients(differentiated, pair(images[part]), pair(cotangent[part]))
                yield r, part, {name: value[:count].reshape(count, -1) for name, value in rows.items()}
    finally:
        for module, key, value in saved_parameters:
            module._parameters[key] = value
        clear_caches(model)


def _by_loop(
    model: nn.Module, images: Tensor, names: Sequence[str], cotangents: Tensor
) -> Iterator[tuple[int, slice, dict[str, Tensor]]]:
    by_name = dict(model.named_parameters())
    parameters = [by_name[name] for name in names]
    saved_flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        for i, image in enumerate(images):
            clear_caches(model)
            with torch.enable_grad(), plain_attention:
                logits = model(pair(image[None]))[0]
            for r, cotangent in enumerate(cotangents[:, i]):
                gradients = logit_gradients(logits, parameters, cotangent, retain_graph=r + 1 < len(cotangents))
                yield r, slice(i, i + 1), {n: g.reshape(1, -1) for n, g in zip(names, gradients, strict=True)}
    finally:
        for parameter, flag in zip(parameters, saved_flags, strict=True):
            parameter.requires_grad_(flag)
        clear_caches(model)


def logit_gradients(
    logits: Tensor, tensors: Sequence[Tensor], cotangent: Tensor, retain_graph: bool = False
) -> Sequence[Tensor]:
    """Return the gradients of ``(cotangent * logits).sum()`` with respect to ``tensors``; zero if it uses none."""
    if not tensors or not logits.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    return torch.autograd.grad(
        logits, tensors, cotangent, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )

"""How each of a model's parameters is differentiated, found by looking at forward passes and verified by autograd.

A layer with a rule (``layer_rules``) that is called once, sample by sample, takes the fast way. Everything else (a raw
parameter, an attention layer, tied weights, a layer called twice) is differentiated image by image, see
``slow_gradients``.

No rule can know what else a model does with a layer: it may read the weight elsewhere, replace ``forward``, or change
inputs and outputs in hooks. So what was found is verified: a few images' gradients by every parameter must be those of
plain autograd, in batches of two sizes. A layer that differs takes the slow way; a model that differs there is refused.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishermask.errors import InputError
from fishermask.tensors.backprop import by_sample, forward, output_gradients
from fishermask.tensors.kernels import plain_attention
from fishermask.tensors.layer_rules import has_rule, sample_gradients
from fishermask.tensors.slow_gradients import clear_caches, copy_model, logit_gradients, slow_gradients

logger = logging.getLogger(__name__)

SIZES = (2, 5)
"""Images in the two batches of the verification: no other axis of a layer's input is as long as both."""
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
"""Largest difference of two gradients, as a share of the largest entry, that is taken for rounding."""


@dataclass(frozen=True)
class Layout:
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


@dataclass(frozen=True)
class _Batch:
    """Images, a random cotangent for one of them, and what plain autograd says of it."""

    images: Tensor
    row: int
    weights: Tensor
    """[C]"""
    logits: Tensor
    """[n, C]"""
    gradients: dict[str, Tensor]
    """Parameter name -> gradient of ``weights . logits[row]``; those that a rule is found to give are dropped."""

    scales: Mapping[str, float]
    """Parameter name -> the largest entry of its gradient, or what is next to nothing beside the largest of all."""

    def cotangents(self) -> Tensor:
        """[1, n, C], zero but for the row."""
        values = self.weights.new_zeros(1, len(self.images), len(self.weights))
        values[0, self.row] = self.weights
        return values


def inspect(model: nn.Module, images: Tensor) -> Layout:
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
    _refuse_batch_statistics(model)
    subject, seen = _examine(model, _different(images), trained)
    batches = [examined.batch for examined in seen]
    _refuse_mixing(subject, batches)
    _refuse_closures(model, subject, batches[0])
    clear_caches(subject)

    frozen = tuple(name for name, _ in subject.named_parameters() if name not in trained)
    layers = [layer for layer in seen[0].layers if layer in seen[1].layers]
    leaves = {layer: _parameters(subject, layer) for layer in layers}
    layers = [layer for layer in layers if any(name in trained for name in leaves[layer])]
    slow = tuple(name for name in trained if name not in {name for layer in layers for name in leaves[layer]})
    head = seen[0].head
    if head != seen[1].head or head not in layers or any(name in frozen for name in leaves[head]):
        head = None  # a last layer that is partly frozen is a layer as any other: its columns are not all there
    return Layout(
        head, tuple(layer for layer in layers if layer != head), slow, frozen, _can_vectorize(subject, batches, slow)
    )


def _different(images: Tensor) -> Tensor:
    """Different images, one for each place in the batches of ``SIZES``."""
    count = sum(SIZES)
    noise = torch.randn(count, *images.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    repeated = images[torch.arange(count, device=images.device) % len(images)]
    # Noise makes equal images different, and takes the ties out of maxima.
    return repeated + (0.1 * float(images.std(correction=0)) or 1.0) * noise.to(images)


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(f"model: layer {name} normalizes by the batch itself, so images affect each other")


def _parameters(model: nn.Module, layer: str) -> list[str]:
    """Names of a layer's own parameters; a model that is a layer itself has the name ``""``."""
    return [f"{layer}.{leaf}".lstrip(".") for leaf, _ in model.get_submodule(layer).named_parameters(recurse=False)]


class _Examined(NamedTuple):
    """What one batch shows of a model."""

    batch: _Batch
    layers: list[str]
    """Layers whose rule gives the gradients of plain autograd."""
    head: str | None
    """The linear layer whose output is the logits."""


def _examine(model: nn.Module, images: Tensor, trained: Sequence[str]) -> tuple[nn.Module, list[_Examined]]:
    """A copy of ``model``, in float64 where it can compute in that, and what each batch of ``SIZES`` shows of it.

    A copy, because forward passes leave their marks on a model.
    """

    def examine(subject: nn.Module, images: Tensor) -> tuple[nn.Module, list[_Examined]]:
        parts = zip(images.split(SIZES), (0, SIZES[1] // 2), strict=True)
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
    layers, plain_head = _agreeing(model, batch, candidates, head)
    for name in {name for layer in layers for name in _parameters(model, layer)}:
        batch.gradients.pop(name, None)  # of a large model they take much memory
    return _Examined(batch, layers, head if plain_head else None)


def _observe_batch(
    model: nn.Module, images: Tensor, row: int, trained: Sequence[str]
) -> tuple[_Batch, list[str], str | None]:
    """One pass of plain autograd: its gradients, the layers whose rule may apply, and which of them is the last.

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
    _check_logits(model, logits, len(images))
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
        own = all(holders[id(p)] == 1 for p in modules[name].parameters(recurse=False))
        return own and calls[name][0][0][0]._version == versions[name]

    layers = [name for name in modules if plain(name)]
    heads = [
        name
        for name in layers
        if isinstance(modules[name], nn.Linear) and calls[name][0][1] is logits and calls[name][0][0][0].dim() == 2
    ]
    largest = {name: _largest(gradient) for name, gradient in zip(trained, gradients, strict=True)}
    least = 1e-4 * max(largest.values())
    batch = _Batch(
        images,
        row,
        weights,
        logits.detach(),
        dict(zip(trained, gradients, strict=True)),
        {name: max(value, least) for name, value in largest.items()},
    )
    return batch, layers, heads[0] if heads else None


def _check_logits(model: nn.Module, logits: Any, count: int) -> None:
    name = type(model).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count:
        raise InputError(f"model: {name} must return logits, one row an image and one column a class")
    if not logits.is_floating_point():
        raise InputError(f"model: {name} must return floating-point logits, got {logits.dtype}")
    if not logits.isfinite().all():
        raise InputError(f"model: {name} returns logits in eval mode that are not finite")


def _refuse_mixing(model: nn.Module, batches: Sequence[_Batch]) -> None:
    """Raise ``InputError`` if the logits of an image depend on the batch, or change from one time to the next."""
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


def _refuse_closures(original: nn.Module, subject: nn.Module, batch: _Batch) -> None:
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


def _agreeing(model: nn.Module, batch: _Batch, layers: Sequence[str], head: str | None) -> tuple[list[str], bool]:
    """Those of ``layers`` whose rule gives the gradients of plain autograd, for one image and none for the others.

    Also whether the logits are the output of ``head`` and nothing was done to them.
    """
    try:
        run = forward(model, batch.images, None, layers)
        (gradients,) = output_gradients(run, batch.cotangents())
        reversed_run = forward(model, batch.images.flip(0), None, layers)
    except Exception:
        # Under gradient checkpointing, for one, a layer's output cannot be differentiated by: no rule applies.
        return [], False
    if not _close(run.logits.detach(), batch.logits):
        return [], False
    agreeing = [
        layer
        for layer in layers
        if layer not in run.irregular + reversed_run.irregular
        # A model may sort its images and put them in order again at the end.
        and _close(reversed_run.inputs[layer].flip(0), run.inputs[layer])
        and _agrees(model, layer, run.inputs[layer], gradients[layer], batch)
    ]
    return agreeing, head in gradients and _close(gradients[head], batch.cotangents()[0])


def _agrees(model: nn.Module, layer: str, given: Tensor, gradient: Tensor, batch: _Batch) -> bool:
    for i in range(len(batch.images)):
        if i != batch.row and not gradient[i].any():
            continue  # nothing of what is asked for this image reaches another's
        rows = sample_gradients(model.get_submodule(layer), given[i : i + 1], gradient[i : i + 1])
        for name in _parameters(model, layer):
            if name not in batch.gradients:
                continue  # it is frozen
            difference = rows[name.rpartition(".")[2]]
            if i == batch.row:
                difference = difference.sub_(batch.gradients[name].reshape(difference.shape))
            if _largest(difference) > TOLERANCE.get(difference.dtype, 0.05) * batch.scales[name]:
                return False
    return True


def _can_vectorize(model: nn.Module, batches: Sequence[_Batch], slow: Sequence[str]) -> bool:
    """Whether ``vmap`` gives the gradients of plain autograd by the parameters ``slow``; else a loop must.

    Raises:
        InputError: nor does the loop.
    """
    images = torch.stack([batch.images[batch.row] for batch in batches])
    cotangents = torch.stack([batch.weights for batch in batches])[None]

    def first_wrong(vectorized: bool) -> str | None:
        # One image at a time, so that what a pass leaves behind in the model meets another.
        for _, part, gradients in slow_gradients(model, images, slow, cotangents, vectorized, chunk=1):
            batch = batches[part.start]
            for name, found in gradients.items():
                expected = batch.gradients.get(name)  # none if a rule gave it for this batch, though not for the other
                if expected is not None and not _close(found.reshape(expected.shape), expected, batch.scales[name]):
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


def _close(found: Tensor, expected: Tensor, scale: float | None = None) -> bool:
    """Whether two tensors are the same but for rounding, on the ``scale`` of the largest entry of the second."""
    scale = _largest(expected) if scale is None else scale
    return _largest(found - expected) <= TOLERANCE.get(expected.dtype, 0.05) * scale


def _largest(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, torch.inf)) if values.numel() else 0.0


@functools.cache
def announce_slow(names: tuple[str, ...]) -> None:
    """Say, once in a process, which parameters have no gradient rule."""
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        logger.warning("model: %d parameters have no gradient rule and take the slow way: %s", len(names), shown)

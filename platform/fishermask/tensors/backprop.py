"""Gradients of the logits with respect to the *outputs* of layers, for all samples of a batch.

In eval mode no sample of a batch affects another, so one backward pass gives the gradients of all samples. Gradients
with respect to *parameters* follow from a layer's input and the gradient of its output (``layer_rules``).

Letters in shapes: n samples, C classes, E inputs of the last layer, k masked parameters, r rows of an embedding.
docs/method.md defines all symbols.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishermask.errors import InputError
from fishermask.tensors.runtime import plain_attention
from fishermask.tensors.slow_gradients import logit_gradients


class ForwardPass(NamedTuple):
    """Results of a forward pass of one batch."""

    logits: Tensor
    """[n, C], with an autograd graph that leads to ``outputs``."""
    hidden: Tensor
    """[n, E], input of the last layer, with a column of ones if it has a bias; [n, 0] without a linear last layer."""
    inputs: dict[str, Tensor]
    """Layer name -> its input [n, ...]."""
    outputs: dict[str, Tensor]
    """Layer name -> its output [n, ...]."""
    irregular: tuple[str, ...]
    """Layers that were not called exactly once with all images of the batch; ``inputs`` and ``outputs`` lack them."""

    @property
    def probabilities(self) -> Tensor:
        """The softmax of the logits, [n, C], without a graph."""
        return self.logits.detach().softmax(-1)


def forward(model: nn.Module, images: Tensor, head: str | None, layers: Sequence[str]) -> ForwardPass:
    """Run ``model`` (in eval mode) on ``images`` [n, ...] and return the inputs and outputs of ``layers``.

    If no parameter requires a gradient, the autograd graph begins at the output of the earliest of ``layers``. If
    ``layers`` is empty, there is no graph. ``layers`` must be among ``GradientPlan.layers``.

    Raises:
        InputError: the logits of the batch are not the output of a single call of ``head``.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    called: set[str] = set()

    def record(name: str, args: tuple[Any, ...], output: Any) -> Tensor | None:
        # If the control flow depends on the data, as in a mixture of experts, a layer may get only some of the images.
        irregular = name in called or not is_per_sample(args, output, len(images))
        called.add(name)
        if irregular:
            inputs.pop(name, None)
            outputs.pop(name, None)
            return None
        inputs[name] = args[0].detach()
        if not output.requires_grad:
            output.requires_grad_()
        outputs[name] = output
        # The next layer gets a copy, because an in-place activation would overwrite the tensor in ``outputs``.
        return output.clone()

    modules = dict(model.named_modules())
    head_calls: list[tuple[tuple[Any, ...], Any, int]] = []
    handles = []
    if head is not None:
        handles.append(
            modules[head].register_forward_hook(
                lambda _m, args, output: head_calls.append((args, output, output._version))
            )
        )
    handles += [
        modules[name].register_forward_hook(lambda _m, args, output, name=name: record(name, args, output))
        for name in layers
    ]
    try:
        with torch.set_grad_enabled(bool(layers)), plain_attention:
            model_output = model(images)
    finally:
        for handle in handles:
            handle.remove()
    irregular = tuple(name for name in layers if name not in outputs)
    logits = model_output.to(images.dtype)  # autocast may change the type
    if head is None:
        return ForwardPass(logits, logits.new_empty(len(logits), 0), inputs, outputs, irregular)
    regular = len(head_calls) == 1 and is_per_sample(*head_calls[0][:2], len(images))
    if not regular or head_calls[0][1] is not model_output or model_output._version != head_calls[0][2]:
        raise InputError(
            f"model: for some images the logits of {type(model).__name__} are not the output of its last layer {head}, "
            "called once with all images of a batch; change its forward method so that they always are"
        )
    features = head_calls[0][0][0].detach().to(images.dtype)
    if modules[head].bias is not None:
        features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    return ForwardPass(logits, features, inputs, outputs, irregular)


def is_per_sample(args: tuple[Any, ...], output: Any, count: int) -> bool:
    """Return whether a layer took one tensor and returned one tensor, both with ``count`` images in dimension 0."""
    tensors = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor)
    return tensors and all(tensor.dim() > 0 and len(tensor) == count for tensor in (args[0], output))


def output_gradients(forward_pass: ForwardPass, cotangents: Tensor) -> Iterator[dict[str, Tensor]]:
    """Compute the gradients of ``(cotangent * logits).sum()`` with respect to the outputs of the layers.

    Each cotangent takes one backward pass.

    Args:
        cotangents: [r, n, C]. They include the derivative of the softmax, which therefore costs nothing and loses no
            digits if a prediction is nearly certain.

    Yields:
        Layer name -> gradient, of the shape of the layer's output; zero if the logits do not depend on the layer.
    """
    outputs = list(forward_pass.outputs.values())
    for i, cotangent in enumerate(cotangents):
        gradients = logit_gradients(forward_pass.logits, outputs, cotangent, retain_graph=i + 1 < len(cotangents))
        yield dict(zip(forward_pass.outputs, gradients, strict=True))

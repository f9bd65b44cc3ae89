"""One forward pass and C - 1 backward passes that give every sample's gradient with respect to every layer *output*.

In eval mode no sample of a batch sees another, so one backward pass serves the whole batch. Gradients with respect to
*parameters* are never formed by autograd: they follow from a layer's input and output gradient (``layer_rules``).

Letters used in all shapes: n samples, C classes, E width of the last hidden layer, k masked parameters.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishermask.errors import InputError
from fishermask.tensors.runtime import plain_attention
from fishermask.tensors.slow_gradients import logit_gradients


class ForwardPass(NamedTuple):
    """What a batch left behind on its way through the model."""

    logits: Tensor
    """[n, C], with the graph back to ``outputs``."""
    hidden: Tensor
    """[n, E] input of the last layer, [n, E + 1] with ones where it has a bias, [n, 0] without a linear last layer."""
    inputs: dict[str, Tensor]
    """Layer name -> its input [n, ...]."""
    outputs: dict[str, Tensor]
    """Layer name -> its output [n, ...]."""
    irregular: tuple[str, ...]
    """Layers that were not called exactly once with all images of this batch; ``inputs`` and ``outputs`` lack them."""

    @property
    def probabilities(self) -> Tensor:
        """softmax of the logits, [n, C], without a graph."""
        return self.logits.detach().softmax(-1)


def forward(model: nn.Module, images: Tensor, head: str | None, layers: Sequence[str]) -> ForwardPass:
    """Run ``images`` [n, ...] through ``model`` (in eval mode), keeping inputs and outputs of ``layers``.

    The graph begins at the earliest of ``layers``: nothing before it is ever differentiated, as long as no parameter
    requires a gradient. With no ``layers`` there is no graph at all. ``layers`` must be among ``GradientPlan.layers``.

    Raises:
        InputError: the logits of this batch are not the output of ``head``, called once.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    called: set[str] = set()

    def keep(name: str, args: tuple[Any, ...], output: Any) -> Tensor | None:
        # Where the route depends on the data, as with experts chosen by argmax, a layer may see some images only.
        irregular = name in called or not by_sample(args, output, len(images))
        called.add(name)
        if irregular:
            inputs.pop(name, None)
            outputs.pop(name, None)
            return None
        inputs[name] = args[0].detach()
        if not output.requires_grad:
            output.requires_grad_()
        outputs[name] = output
        # What follows gets a copy: an in-place activation would otherwise overwrite the tensor we differentiate by.
        return output.clone()

    modules = dict(model.named_modules())
    last: list[tuple[tuple[Any, ...], Any, int]] = []
    handles = []
    if head is not None:
        handles.append(
            modules[head].register_forward_hook(lambda _m, args, output: last.append((args, output, output._version)))
        )
    handles += [
        modules[name].register_forward_hook(lambda _m, args, output, name=name: keep(name, args, output))
        for name in layers
    ]
    try:
        with torch.set_grad_enabled(bool(layers)), plain_attention:
            returned = model(images)
    finally:
        for handle in handles:
            handle.remove()
    irregular = tuple(name for name in layers if name not in outputs)
    logits = returned.to(images.dtype)  # under autocast it has another
    if head is None:
        return ForwardPass(logits, logits.new_empty(len(logits), 0), inputs, outputs, irregular)
    regular = len(last) == 1 and by_sample(*last[0][:2], len(images))
    if not regular or last[0][1] is not returned or returned._version != last[0][2]:
        raise InputError(
            f"model: for some images the logits of {type(model).__name__} are not just the output of its last layer, "
            f"{head}, called once for all images of a batch; give it a last layer that is always called so"
        )
    features = last[0][0][0].detach().to(images.dtype)
    if modules[head].bias is not None:
        features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    return ForwardPass(logits, features, inputs, outputs, irregular)


def by_sample(args: tuple[Any, ...], output: Any, count: int) -> bool:
    """Whether a layer got one tensor and returned one, both with ``count`` images first."""
    tensors = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor)
    return tensors and all(tensor.dim() > 0 and len(tensor) == count for tensor in (args[0], output))


def output_gradients(run: ForwardPass, cotangents: Tensor) -> Iterator[dict[str, Tensor]]:
    """Gradients of the logits, weighted by each of ``cotangents`` [R, n, C], by the layers' outputs: one pass for each.

    Yields:
        Layer name -> gradient, [n, ...] as the layer's output; zero where the logits do not depend on the layer.

    What is wanted of the softmax rides in the cotangents, and so costs nothing and does not cancel when a prediction is
    nearly certain.
    """
    outputs = list(run.outputs.values())
    for i, cotangent in enumerate(cotangents):
        gradients = logit_gradients(run.logits, outputs, cotangent, retain_graph=i + 1 < len(cotangents))
        yield dict(zip(run.outputs, gradients, strict=True))

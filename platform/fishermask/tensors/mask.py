"""The Fisher diagonal, and masks of parameters (FISH mask, Sung et al. 2021; FisherMask, arXiv 2411.05752).

A mask always contains the whole last layer. ``Mask.entries`` lists the masked entries of the body, that is, of all
other trained parameters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishermask.errors import InputError
from fishermask.tensors import contrasts
from fishermask.tensors.backprop import forward, output_gradients
from fishermask.tensors.gradient_plan import GradientPlan
from fishermask.tensors.layer_rules import full_name, split_name, squared_sums
from fishermask.tensors.slow_gradients import pair, slow_gradients

RELATIVE_THRESHOLD = 2.0
"""``relative_mask`` masks only entries whose ratio to the mean of their layer is above this threshold."""


@dataclass(frozen=True)
class Mask:
    """The whole last layer, and ``entries`` of the body."""

    plan: GradientPlan
    entries: dict[str, Tensor]
    """Parameter name -> ascending flat indices of its masked entries; parameters without masked entries are absent."""

    def to(self, device: torch.device) -> "Mask":
        """Return the mask with its indices on ``device``."""
        return Mask(self.plan, {name: indices.to(device) for name, indices in self.entries.items()})

    @property
    def body_size(self) -> int:
        """Number of masked parameters outside the last layer."""
        return sum(len(indices) for indices in self.entries.values())

    @property
    def layers(self) -> list[str]:
        """Names of the layers of the body that have a gradient rule and hold masked parameters."""
        with_rule = (split_name(name)[0] for name in self.entries if name not in self.plan.slow)
        return list(dict.fromkeys(with_rule))

    @property
    def slow(self) -> tuple[str, ...]:
        """Names of the masked parameters without a gradient rule."""
        return tuple(name for name in self.entries if name in self.plan.slow)


def head_size(model: nn.Module, plan: GradientPlan) -> int:
    """Return the number of parameters of the last layer; 0 without a linear last layer."""
    return 0 if plan.head is None else sum(p.numel() for p in model.get_submodule(plan.head).parameters())


def body_parameters(model: nn.Module, plan: GradientPlan) -> dict[str, Tensor]:
    """Return name -> parameter of all trained parameters outside the last layer, in the order of the model."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if split_name(name)[0] != plan.head and name not in plan.frozen
    }


def fisher_diagonal(model: nn.Module, images: Tensor, plan: GradientPlan) -> dict[str, Tensor]:
    """Return the sum over ``images`` [n, ...] of the Fisher diagonal: body parameter -> flat float64 tensor.

    For parameter j this is ``sum_x sum_c p_c (d log p_c / d theta_j)^2``, an expectation over labels drawn from the
    prediction of the model. C - 1 contrasts between the classes give the same sum as C classes.
    """
    count, images = len(images), pair(images)
    forward_pass = forward(model, images, plan.head, plan.layers)
    modules, body = dict(model.named_modules()), body_parameters(model, plan)
    sums: dict[str, Tensor] = {}
    passes = []
    cotangents = contrasts.dense(forward_pass.probabilities.mT, "sqrt").permute(0, 2, 1).contiguous()
    cotangents[:, count:] = 0
    for gradients in output_gradients(forward_pass, cotangents):
        passes.append(gradients)
    slow = [name for name in body if name in plan.slow or split_name(name)[0] in forward_pass.irregular]
    for _, _, rows in slow_gradients(model, images[:count], slow, cotangents[:, :count], plan.vectorized):
        for name, gradient in rows.items():
            sums[name] = sums.get(name, 0) + gradient.double().square().sum(0)
    for layer in forward_pass.outputs:
        squares = squared_sums(
            modules[layer], forward_pass.inputs[layer], [gradients.pop(layer) for gradients in passes]
        )
        sums |= {full_name(layer, leaf): value.double() for leaf, value in squares.items()}
    return {name: sums[name] for name in body}


def mask_size(model: nn.Module, plan: GradientPlan, fraction: float) -> int:
    """Return the size of a mask that holds a ``fraction`` of all trained parameters, last layer included.

    Raises:
        InputError: the fraction is too small to hold the last layer; the message gives the smallest valid fraction.
    """
    total = sum(p.numel() for name, p in model.named_parameters() if name not in plan.frozen)
    size, needed = round(fraction * total), max(1, head_size(model, plan))
    if size < needed:
        # Four significant digits, rounded up, so that the fraction in the message works.
        unit = 10.0 ** (math.floor(math.log10(needed / total)) - 3)
        smallest = math.ceil(needed / total / unit) * unit
        raise InputError(
            f"fraction: {fraction:g} of {total:,} parameters is {size:,}, but the mask must hold the {needed:,} "
            f"parameters of the last layer; the smallest fraction that works is {smallest:g}"
        )
    return size


def global_mask(diagonal: Mapping[str, Tensor], plan: GradientPlan, body_size: int) -> Mask:
    """Return the mask of the ``body_size`` largest entries of the whole body; ties go to the lowest index."""
    return _entries(diagonal, plan, _largest(torch.cat(list(diagonal.values())), body_size))


def layerwise_mask(diagonal: Mapping[str, Tensor], plan: GradientPlan, body_size: int) -> Mask:
    """Return the mask of the largest entries of each layer, with the same share of every layer.

    Shares are rounded down. To reach ``body_size`` entries in total, the layers with the largest remainders get one
    entry more; ties go to the first layer.
    """
    layers = _by_layer(diagonal)
    total = sum(len(values) for values in layers.values())
    exact = {layer: body_size * len(values) / total for layer, values in layers.items()}
    counts = {layer: int(share) for layer, share in exact.items()}
    for layer in sorted(exact, key=lambda layer: counts[layer] - exact[layer])[: body_size - sum(counts.values())]:
        counts[layer] += 1
    chosen, start = [], 0
    for layer, values in layers.items():
        chosen.append(_largest(values, counts[layer]) + start)
        start += len(values)
    return _entries(diagonal, plan, torch.cat(chosen))


def relative_mask(diagonal: Mapping[str, Tensor], plan: GradientPlan, body_size: int) -> Mask:
    """Return the mask of the entries with the largest ratio to the mean of their layer.

    It has at most ``body_size`` entries, and only entries whose ratio is above ``RELATIVE_THRESHOLD``.
    """
    ratio = torch.cat([values / values.mean() for values in _by_layer(diagonal).values()]).nan_to_num(nan=0.0)
    chosen = _largest(ratio, body_size)
    return _entries(diagonal, plan, chosen[ratio[chosen] > RELATIVE_THRESHOLD])


def random_mask(
    parameters: Mapping[str, Tensor], plan: GradientPlan, body_size: int, generator: torch.Generator
) -> Mask:
    """Return the mask of ``body_size`` entries of the body, drawn uniformly at random."""
    total = sum(values.numel() for values in parameters.values())
    chosen = torch.randperm(total, generator=generator)[:body_size].sort().values
    return _entries({name: values.flatten() for name, values in parameters.items()}, plan, chosen)


def _largest(values: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` largest values, ascending; ties go to the lowest index."""
    return torch.sort(values, descending=True, stable=True).indices[:count].sort().values


def _by_layer(diagonal: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return layer -> concatenated values of its parameters, which are adjacent in the order of the model."""
    layers: dict[str, Tensor] = {}
    for name, values in diagonal.items():
        layer = split_name(name)[0]
        layers[layer] = torch.cat([layers[layer], values]) if layer in layers else values
    return layers


def _entries(parameters: Mapping[str, Tensor], plan: GradientPlan, chosen: Tensor) -> Mask:
    """Return the mask of ``chosen``: ascending indices into the concatenation of all ``parameters``."""
    entries, start = {}, 0
    for name, value in parameters.items():
        inside = chosen[(chosen >= start) & (chosen < start + len(value))] - start
        if len(inside):
            entries[name] = inside
        start += len(value)
    return Mask(plan, entries)


def last_layer_mask(plan: GradientPlan) -> Mask:
    """Return the mask of the last layer alone (BAIT, Ash et al. 2021).

    Raises:
        InputError: the model does not end in a linear layer.
    """
    if plan.head is None:
        raise InputError(
            "model: it does not end in a linear layer, but the strategy needs one; return the output of nn.Linear"
        )
    return Mask(plan, {})

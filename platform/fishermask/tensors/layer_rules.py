"""Gradient rules: the gradients of each sample with respect to the parameters of a layer, in closed form.

The rules take the gradients of a layer's output as ``g`` [n, O, S] and its input as rows ``a`` [n, I, S], with O
outputs, I inputs and S positions (pixels or tokens; 1 for a linear layer on vectors). The gradients of one sample are

* ``sum_s g[o, s] a[i, s]`` for weight [o, i] of a linear layer or a convolution. In a convolution, i runs over input
  channels and kernel positions; in a grouped convolution, over the channels of the group of o.
* ``sum_s g[o, s] ahat[o, s]`` for weight [o] of batch norm in eval mode, layer norm and group norm, with the normalized
  input ahat.
* ``sum_s g[o, s]`` for bias [o] of any of these layers.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DENSE_FACTOR = 16
"""Ratio of the speed of a matrix product to the speed of a gathered sum. The gradients of masked entries are read from
the product of all output and input rows that hold masked entries, unless this product has more than ``DENSE_FACTOR``
times as many entries as are masked."""
PAIRS_FACTOR = 3
"""The Fisher diagonal is summed over the S (S + 1) / 2 pairs of positions, instead of r S products, if S + 1 is at most
``PAIRS_FACTOR`` times r. The factor is larger than 2, because one large product is faster than many small ones."""
CACHED_NUMBERS = 2**19
"""Number of gradient entries that fit into the CPU cache."""
ELEMENTWISE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
RULES = (nn.Linear, nn.Conv2d, *ELEMENTWISE)


def full_name(layer: str, leaf: str) -> str:
    """Return ``conv1.weight`` for ``conv1`` and ``weight``; the name of the whole model is ``""``."""
    return f"{layer}.{leaf}" if layer else leaf


def split_name(parameter: str) -> tuple[str, str]:
    """Return the layer and the leaf, its name within the layer, of a full parameter name."""
    layer, _, leaf = parameter.rpartition(".")
    return layer, leaf


def direct_parameters(model: nn.Module, layer: str) -> list[str]:
    """Return the full names of the parameters of ``layer`` itself, without those of its submodules."""
    return [full_name(layer, leaf) for leaf, _ in model.get_submodule(layer).named_parameters(recurse=False)]


def has_rule(module: nn.Module) -> bool:
    """Return whether a layer has a gradient rule.

    A subclass has a rule only if it inherits ``forward`` and its parameters are a weight and at most a bias: weight
    norm, spectral norm and pruning derive the weight from other parameters.
    """
    leaves = {leaf for leaf, _ in module.named_parameters(recurse=False)}
    has_forward = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in RULES)
    return has_forward and "weight" in leaves and leaves <= {"weight", "bias"}


def output_rows(module: nn.Module, gradient: Tensor) -> Tensor:
    """Return the gradient of the output, [n, ...], as [n, O, S]."""
    if isinstance(module, nn.Linear):
        return gradient.flatten(1, -2).mT if gradient.dim() > 2 else gradient.unsqueeze(-1)
    if isinstance(module, nn.LayerNorm):
        return gradient.reshape(len(gradient), -1, math.prod(module.normalized_shape)).mT
    return gradient.flatten(2) if gradient.dim() > 2 else gradient.unsqueeze(-1)


def input_rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the layer input [n, ...] as [n, I, S]; for a normalization layer, the normalized input [n, O, S].

    For a grouped convolution, I includes all groups.
    """
    if isinstance(module, nn.Conv2d):
        return F.unfold(_padded(module, inputs), module.kernel_size, module.dilation, 0, module.stride)
    return _plain_rows(module, inputs)


def _padded(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)


def _plain_rows(module: nn.Module, inputs: Tensor) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        return output_rows(module, F.layer_norm(inputs, module.normalized_shape, None, None, module.eps))
    if isinstance(module, nn.GroupNorm):
        return output_rows(module, F.group_norm(inputs, module.num_groups, None, None, module.eps))
    rows = output_rows(module, inputs)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        assert module.running_mean is not None and module.running_var is not None
        return (rows - module.running_mean[:, None]) * torch.rsqrt(module.running_var + module.eps)[:, None]
    return rows


def _some_input_rows(module: nn.Module, inputs: Tensor, rows: Tensor) -> Tensor:
    """Return ``input_rows(module, inputs)[:, rows]`` without forming the other rows."""
    if not isinstance(module, nn.Conv2d):
        return _plain_rows(module, inputs)[:, rows]
    (height, width), (down, right) = module.kernel_size, module.dilation
    padded = _padded(module, inputs)
    step_h, step_w = module.stride
    out_h = (padded.shape[2] - down * (height - 1) - 1) // step_h + 1
    out_w = (padded.shape[3] - right * (width - 1) - 1) // step_w + 1
    # A view [n, I, kh, kw, out_h, out_w] of the padded input: only the requested rows are copied.
    n_stride, i_stride, h_stride, w_stride = padded.stride()
    patches = padded.as_strided(
        (padded.shape[0], padded.shape[1], height, width, out_h, out_w),
        (n_stride, i_stride, down * h_stride, right * w_stride, step_h * h_stride, step_w * w_stride),
    )
    channel, position = rows // (height * width), rows % (height * width)
    return patches[:, channel, position // width, position % width].flatten(2)


def sample_gradients(module: nn.Module, inputs: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Return leaf -> gradients of each sample, [n, size of the parameter]; ``gradient`` is that of the output."""
    g, rows = output_rows(module, gradient), input_rows(module, inputs)
    if isinstance(module, ELEMENTWISE):
        weight = (g * rows).sum(-1)
    else:
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        # [n, groups, O / groups, I / groups]
        weight = g.unflatten(1, (groups, -1)) @ rows.unflatten(1, (groups, -1)).mT
    return {"weight": weight.flatten(1), "bias": g.sum(-1)}


def squared_sums(module: nn.Module, inputs: Tensor, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return leaf -> the sum over samples and cotangents of the squared gradients of single samples, flat.

    For weight [o, i] this is the sum of ``(sum_s g[o, s] a[i, s])^2``. There are two orders of summation. The first
    computes the gradient of each sample and squares it. The second expands the square into pairs of positions. It is
    one matrix product, forms no gradient of a weight, and is cheaper for few positions.

    Args:
        gradients: gradients of the output for each of r cotangents, [n, ...] each.
    """
    g = torch.stack([output_rows(module, gradient) for gradient in gradients], dim=1)
    rows = input_rows(module, inputs)
    positions = rows.shape[-1]
    if isinstance(module, ELEMENTWISE):
        weight = (g * rows[:, None]).sum(-1).square().sum((0, 1))
    elif isinstance(module, nn.Conv2d) and module.groups > 1:
        weight = _squares_by_group(g, rows, module.groups)
    elif positions + 1 <= PAIRS_FACTOR * g.shape[1]:
        weight = _squares_by_pairs(g, rows)
    else:
        weight = _squares_by_sample(g, rows)
    return {"weight": weight.flatten(), "bias": g.sum(-1).square().sum((0, 1))}


def _squares_by_pairs(g: Tensor, rows: Tensor) -> Tensor:
    """Return ``sum_n sum_(s, t) (sum_c g[n, c, o, s] g[n, c, o, t]) a[n, i, s] a[n, i, t]``, [O, I]."""
    s, t = torch.triu_indices(rows.shape[-1], rows.shape[-1], device=rows.device)
    # Pairs with s < t count twice, for (s, t) and (t, s).
    multiplicity = torch.where(s == t, 1.0, 2.0).to(rows.dtype)
    gradient_pairs = torch.einsum("ncos,ncot->onst", g, g)[..., s, t]
    input_pairs = (rows[..., s] * rows[..., t] * multiplicity).transpose(0, 1)
    # Only rounding can make a sum of squares negative.
    return (gradient_pairs.flatten(1) @ input_pairs.flatten(1).mT).clamp_min(0)


def _squares_by_sample(g: Tensor, rows: Tensor) -> Tensor:
    """Return the sum of squared gradients of single samples, [O, I], from the gradients of all samples."""
    n, num_cotangents, outputs, _ = g.shape
    width = rows.shape[1]
    samples_at_once = max(1, CACHED_NUMBERS // (num_cotangents * outputs * width))
    weight = rows.new_zeros(outputs * width)
    for first in range(0, n, samples_at_once):
        part = slice(first, first + samples_at_once)
        product = torch.bmm(g[part].flatten(1, 2), rows[part].mT)
        weight += product.square_().view(-1, outputs * width).sum(0)
    return weight


def _squares_by_group(g: Tensor, rows: Tensor, groups: int) -> Tensor:
    """Return the sum of squared gradients of a grouped convolution, [O, I / groups]."""
    weight = None
    for sample_g, sample_rows in zip(g, rows, strict=True):
        outputs = sample_g.unflatten(1, (groups, -1)).transpose(0, 1)  # [groups, r, O / groups, S]
        inputs = sample_rows.unflatten(0, (groups, -1))  # [groups, I / groups, S]
        square = (outputs.flatten(1, 2) @ inputs.mT).square_().unflatten(1, outputs.shape[1:3]).sum(1)
        weight = square if weight is None else weight.add_(square)
    assert weight is not None
    return weight


def masked_entries(module: nn.Module, inputs: Tensor, parameter: str, entries: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function from the gradient of the output to the gradients [n, m] with respect to ``entries`` [m].

    The function can be called for many output gradients; work that depends on the layer's input is done once.

    Args:
        parameter: leaf of the parameter, ``weight`` or ``bias``.
        entries: flat indices into the parameter.
    """
    if parameter == "bias":
        return lambda gradient: output_rows(module, gradient).sum(-1)[:, entries]
    if isinstance(module, ELEMENTWISE):
        normalized = _plain_rows(module, inputs)[:, entries]
        return lambda gradient: (output_rows(module, gradient)[:, entries] * normalized).sum(-1)
    assert isinstance(module, nn.Linear | nn.Conv2d)
    width = module.weight[0].numel()
    out_row, in_row = entries // width, entries % width
    if isinstance(module, nn.Conv2d):
        in_row = in_row + width * (out_row // (module.out_channels // module.groups))
    output_indices, out_position = out_row.unique(return_inverse=True)
    input_indices, in_position = in_row.unique(return_inverse=True)
    rows = _some_input_rows(module, inputs, input_indices)
    if len(output_indices) * len(input_indices) <= DENSE_FACTOR * len(entries):
        transposed = rows.mT.contiguous()
        flat = out_position * len(input_indices) + in_position
        return lambda gradient: torch.bmm(output_rows(module, gradient)[:, output_indices], transposed).flatten(1)[
            :, flat
        ]
    masked_rows = rows[:, in_position]
    return lambda gradient: (output_rows(module, gradient)[:, out_row] * masked_rows).sum(-1)

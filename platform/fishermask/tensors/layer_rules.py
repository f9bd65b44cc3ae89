"""Per-sample parameter gradients from a layer's input and output gradient, in closed form.

Every rule is brought into one format: output gradients ``g`` [n, O, S] and input rows ``a`` [n, K, S], where S runs
over positions (1 for a plain linear layer). Then, for one sample,

* linear, convolution: ``dW[o, k] = sum_s g[o, s] a[k, s]`` (a convolution's k runs over channel and kernel position,
  in a grouped one over the channels of o's group);
* batch norm in eval mode, layer norm, group norm: ``dW[o] = sum_s g[o, s] xhat[o, s]``;
* any bias: ``db[o] = sum_s g[o, s]``.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The full product of the touched output rows and input rows is formed when it is at most this many times larger than
# the masked entries; a matrix product does about that many more multiplications a second than a gathered sum.
DENSE_FACTOR = 16
# Pairs of positions are summed where they are fewer than this times the positions of all classes: S (S + 1) / 2 against
# C S, with a margin, because their single product runs faster than many small ones.
PAIRS_FACTOR = 3
CACHED_NUMBERS = 2**19


ELEMENTWISE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
RULES = (nn.Linear, nn.Conv2d, *ELEMENTWISE)


def full_name(layer: str, leaf: str) -> str:
    """Return ``conv1.weight`` for ``conv1`` and ``weight``; a model that is a layer itself has the name ``""``."""
    return f"{layer}.{leaf}" if layer else leaf


def split_name(parameter: str) -> tuple[str, str]:
    """The opposite of ``full_name``."""
    layer, _, leaf = parameter.rpartition(".")
    return layer, leaf


def own_parameters(model: nn.Module, layer: str) -> list[str]:
    """Names in ``model`` of the parameters that ``layer`` itself holds."""
    return [full_name(layer, leaf) for leaf, _ in model.get_submodule(layer).named_parameters(recurse=False)]


def has_rule(module: nn.Module) -> bool:
    """Whether the gradients of a layer's own parameters have a closed form here.

    A subclass counts only if it computes what its base class does, from a weight and perhaps a bias: weight norm,
    spectral norm and pruning put other parameters in the weight's place.
    """
    leaves = {leaf for leaf, _ in module.named_parameters(recurse=False)}
    known = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in RULES)
    return known and "weight" in leaves and leaves <= {"weight", "bias"}


def output_rows(module: nn.Module, gradient: Tensor) -> Tensor:
    """Output gradient [n, ...] as [n, O, S]."""
    if isinstance(module, nn.Linear):
        return gradient.flatten(1, -2).mT if gradient.dim() > 2 else gradient.unsqueeze(-1)
    if isinstance(module, nn.LayerNorm):
        return gradient.reshape(len(gradient), -1, math.prod(module.normalized_shape)).mT
    return gradient.flatten(2) if gradient.dim() > 2 else gradient.unsqueeze(-1)


def input_rows(module: nn.Module, given: Tensor) -> Tensor:
    """Layer input [n, ...] as [n, K, S], all groups of a convolution; for a norm the normalized input [n, O, S]."""
    if isinstance(module, nn.Conv2d):
        return F.unfold(_padded(module, given), module.kernel_size, module.dilation, 0, module.stride)
    return _plain_rows(module, given)


def _padded(module: nn.Conv2d, given: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(given, module._reversed_padding_repeated_twice, mode=mode)


def _plain_rows(module: nn.Module, given: Tensor) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        return output_rows(module, F.layer_norm(given, module.normalized_shape, None, None, module.eps))
    if isinstance(module, nn.GroupNorm):
        return output_rows(module, F.group_norm(given, module.num_groups, None, None, module.eps))
    rows = output_rows(module, given)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        assert module.running_mean is not None and module.running_var is not None
        return (rows - module.running_mean[:, None]) * torch.rsqrt(module.running_var + module.eps)[:, None]
    return rows


def _some_input_rows(module: nn.Module, given: Tensor, rows: Tensor) -> Tensor:
    """``input_rows(module, given)[:, rows]`` without forming the others."""
    if not isinstance(module, nn.Conv2d):
        return _plain_rows(module, given)[:, rows]
    (height, width), (down, right) = module.kernel_size, module.dilation
    padded = _padded(module, given)
    step_h, step_w = module.stride
    out_h = (padded.shape[2] - down * (height - 1) - 1) // step_h + 1
    out_w = (padded.shape[3] - right * (width - 1) - 1) // step_w + 1
    # A view [n, I, kh, kw, out_h, out_w] of the padded input: nothing is copied but the rows asked for.
    n_stride, i_stride, h_stride, w_stride = padded.stride()
    patches = padded.as_strided(
        (padded.shape[0], padded.shape[1], height, width, out_h, out_w),
        (n_stride, i_stride, down * h_stride, right * w_stride, step_h * h_stride, step_w * w_stride),
    )
    channel, position = rows // (height * width), rows % (height * width)
    return patches[:, channel, position // width, position % width].flatten(2)


def sample_gradients(module: nn.Module, given: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Parameter -> gradient of each sample, [n, size of the parameter], from a layer's input and output gradient."""
    g, rows = output_rows(module, gradient), input_rows(module, given)
    if isinstance(module, ELEMENTWISE):
        weight = (g * rows).sum(-1)
    else:
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        weight = (
            g.unflatten(1, (groups, -1)) @ rows.unflatten(1, (groups, -1)).mT
        )  # [n, groups, O / groups, K / groups]
    return {"weight": weight.flatten(1), "bias": g.sum(-1)}


def squared_sums(module: nn.Module, given: Tensor, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """Parameter -> sum over samples and over ``gradients`` of the squared per-sample gradient, flat.

    For a matrix of weights that is ``sum (sum_s g[o, s] a[k, s])^2``. Two orders of summation give it: form every
    sample's gradient and square it, or expand the square into pairs of positions, which needs no gradient at all, only
    one matrix product, and is cheaper where there are few positions.
    """
    g = torch.stack([output_rows(module, gradient) for gradient in gradients], dim=1)
    rows = input_rows(module, given)
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
    """``sum_n sum_(s, t) (sum_c g[n, c, o, s] g[n, c, o, t]) a[n, k, s] a[n, k, t]``, each pair s <= t once: [O, K]."""
    s, t = torch.triu_indices(rows.shape[-1], rows.shape[-1], device=rows.device)
    twice = torch.where(s == t, 1.0, 2.0).to(rows.dtype)
    left = torch.einsum("ncos,ncot->onst", g, g)[..., s, t]
    right = (rows[..., s] * rows[..., t] * twice).transpose(0, 1)
    # The terms of a square cancel in rounding only: what falls below zero is zero.
    return (left.flatten(1) @ right.flatten(1).mT).clamp_min(0)


def _squares_by_sample(g: Tensor, rows: Tensor) -> Tensor:
    """Every sample's gradient for every class, squared and added, as many at once as stay in the cache: [O, K]."""
    n, num_classes, outputs, _ = g.shape
    width = rows.shape[1]
    group = max(1, CACHED_NUMBERS // (num_classes * outputs * width))
    weight = rows.new_zeros(outputs * width)
    for first in range(0, n, group):
        part = slice(first, first + group)
        product = torch.bmm(g[part].flatten(1, 2), rows[part].mT)
        weight += product.square_().view(-1, outputs * width).sum(0)
    return weight


def _squares_by_group(g: Tensor, rows: Tensor, groups: int) -> Tensor:
    """The same for a grouped convolution: each output meets the inputs of its own group, [O, K / groups]."""
    weight = None
    for one, given in zip(g, rows, strict=True):
        outputs = one.unflatten(1, (groups, -1)).transpose(0, 1)  # [groups, C, O / groups, S]
        inputs = given.unflatten(0, (groups, -1))  # [groups, K / groups, S]
        square = (outputs.flatten(1, 2) @ inputs.mT).square_().unflatten(1, outputs.shape[1:3]).sum(1)
        weight = square if weight is None else weight.add_(square)
    assert weight is not None
    return weight


def masked_entries(module: nn.Module, given: Tensor, parameter: str, entries: Tensor) -> Callable[[Tensor], Tensor]:
    """A function: output gradient -> per-sample gradients [n, m] of ``entries`` [m] of one of the layer's parameters.

    ``entries`` are flat indices into the parameter. What depends on the layer's input alone is done once.
    """
    if parameter == "bias":
        return lambda gradient: output_rows(module, gradient).sum(-1)[:, entries]
    if isinstance(module, ELEMENTWISE):
        normalized = _plain_rows(module, given)[:, entries]
        return lambda gradient: (output_rows(module, gradient)[:, entries] * normalized).sum(-1)
    assert isinstance(module, nn.Linear | nn.Conv2d)
    width = module.weight[0].numel()
    out_row, in_row = entries // width, entries % width
    if isinstance(module, nn.Conv2d):
        in_row = in_row + width * (out_row // (module.out_channels // module.groups))
    outs, out_position = out_row.unique(return_inverse=True)
    ins, in_position = in_row.unique(return_inverse=True)
    rows = _some_input_rows(module, given, ins)
    if len(outs) * len(ins) <= DENSE_FACTOR * len(entries):
        transposed = rows.mT.contiguous()
        flat = out_position * len(ins) + in_position
        return lambda gradient: torch.bmm(output_rows(module, gradient)[:, outs], transposed).flatten(1)[:, flat]
    chosen = rows[:, in_position]
    return lambda gradient: (output_rows(module, gradient)[:, out_row] * chosen).sum(-1)

"""Fisher embeddings in factored form, and their products with matrices.

The embedding of an image is ``V = A J`` [r, k], where J holds the gradients of its logits with respect to the masked
parameters, and A the contrasts between classes (``contrasts``). ``V^T V`` is the Fisher information of the image, and
r = C - 1. The last layer is linear, so its columns are an outer product, ``V_head[c, (o, i)] = A_co h_i``. An embedding
stores p, from which A follows, h, and the dense columns of the body: ``r k_body + E + C`` numbers per image instead of
C k.

Each row of A sums to zero over the classes, so the E columns of the last class are minus the sum of the columns of the
other classes. All matrices omit them, and V in this package is V' of docs/method.md, [r, k - E]. Its columns are those
of the last layer, (o, i) with i fastest and a bias as the last i, then those of the body in the order of the mask.
``add_identity`` adds the equivalent of the identity of all k columns.

Images are the *last* axis of every tensor. Elementwise operations then run along contiguous memory, and products are a
few large matrix products instead of many small ones.

As an *approximation* for many classes, an embedding may use only the q most probable classes of each image,
renormalized, as if the other classes were impossible. Then r = q - 1, and ``classes`` lists the classes of each image.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fishermask.tensors import contrasts
from fishermask.tensors.backprop import ForwardPass, forward, output_gradients
from fishermask.tensors.contrasts import Weighting
from fishermask.tensors.layer_rules import masked_entries, split_name
from fishermask.tensors.mask import Mask
from fishermask.tensors.slow_gradients import pair, slow_gradients

STRIP = 1024
"""Number of columns of the body whose information is computed at once."""


@dataclass(frozen=True)
class Embedding:
    """Fisher embeddings of n images that use q classes of each image: all C, or fewer with ``top_classes``."""

    probabilities: Tensor
    """[q, n]"""
    hidden: Tensor
    """[E, n]"""
    body: Tensor
    """[r, k_body, n]"""
    classes: Tensor | None = None
    """[q, n], the classes that the embedding of each image uses, ascending; None for all classes."""
    all_classes: int = 0
    """C, if ``classes`` is not None."""
    weighting: Weighting = "sqrt"

    def map(self, change: Callable[[Tensor], Tensor]) -> "Embedding":
        """Return the embeddings with ``change`` applied to each tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {key: change(value) for key, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def to(self, dtype: torch.dtype) -> "Embedding":
        """Return the embeddings with floating-point numbers of type ``dtype``."""
        return self.map(lambda part: part.to(dtype) if part.is_floating_point() else part)

    @property
    def rows(self) -> int:
        """r, the number of rows."""
        return len(self.body)

    @property
    def num_classes(self) -> int:
        """C, the number of all classes."""
        return len(self.probabilities) if self.classes is None else self.all_classes

    @property
    def head_size(self) -> int:
        """Number of columns of the last layer, without those of the last class."""
        return (self.num_classes - 1) * len(self.hidden)

    @property
    def size(self) -> int:
        """Number of columns, k - E."""
        return self.head_size + self.body.shape[1]


def embed(
    model: nn.Module,
    images: Tensor,
    mask: Mask,
    weighting: Weighting = "sqrt",
    top_classes: int | None = None,
    autocast: torch.dtype | None = None,
) -> Embedding:
    """Return the Fisher embeddings of ``images`` [n, ...] for ``mask``.

    Args:
        weighting: ``sqrt``: V^T V is the Fisher information. ``none``: all classes have the same weight, as in the
            paper's released code.
        top_classes: q, the number of classes of each image to use; None for all classes.
        autocast: data type in which layers compute. Results have the type of the images.
    """
    count, images = len(images), pair(images)
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        forward_pass = forward(model, images, mask.plan.head, mask.layers)
    p, top = forward_pass.probabilities, None
    if top_classes is not None and top_classes < p.shape[1]:
        top = p.argsort(descending=True, stable=True)[:, :top_classes].sort().values
        p = p.gather(1, top)
        p = p / p.sum(1, keepdim=True)
    rows = contrasts.num_rows(p.shape[1], weighting)
    body = p.new_empty(rows, mask.body_size, len(images))
    if mask.entries:
        cotangents = contrasts.dense(p.mT, weighting).permute(0, 2, 1).contiguous()
        if top is not None:
            all_classes = cotangents.new_zeros(rows, *forward_pass.logits.shape)
            cotangents = all_classes.scatter_(2, top.expand(rows, -1, -1), cotangents)
        _fill_body(body, model, images, mask, forward_pass, cotangents)
    result = Embedding(
        p.mT,
        forward_pass.hidden.mT,
        body,
        None if top is None else top.mT,
        0 if top is None else forward_pass.logits.shape[1],
        weighting,
    )
    return result if count == len(images) else take(result, slice(count)).map(Tensor.contiguous)


def _fill_body(
    body: Tensor, model: nn.Module, images: Tensor, mask: Mask, forward_pass: ForwardPass, cotangents: Tensor
) -> None:
    """Write the gradients of the logits, weighted by ``cotangents`` [r, n, C], to ``body`` [r, k_body, n]."""
    modules, columns, start = dict(model.named_modules()), {}, 0
    for name, entries in mask.entries.items():
        columns[name] = slice(start, start + len(entries))
        start += len(entries)
    slow = [name for name in columns if name in mask.slow or split_name(name)[0] in forward_pass.irregular]
    entry_gradients = {}
    for name in columns:
        layer, leaf = split_name(name)
        if name not in slow:
            layer_input = forward_pass.inputs[layer].to(images.dtype)
            entry_gradients[name] = masked_entries(modules[layer], layer_input, leaf, mask.entries[name])
    if entry_gradients:
        for row, gradients in zip(body, output_gradients(forward_pass, cotangents), strict=True):
            for name, compute_entries in entry_gradients.items():
                row[columns[name]] = compute_entries(gradients[split_name(name)[0]].to(images.dtype)).mT
    for row_index, part, gradients in slow_gradients(model, images, slow, cotangents, mask.plan.vectorized):
        for name, gradient in gradients.items():
            body[row_index, columns[name], part] = gradient[:, mask.entries[name]].mT


def take(embedding: Embedding, rows: slice | Tensor) -> Embedding:
    """Return the embeddings of the images at ``rows``."""
    return embedding.map(lambda part: part[..., rows])


def concatenate(parts: list[Embedding]) -> Embedding:
    """Return the embeddings of all ``parts``, concatenated."""
    values = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Embedding)}
    joined: dict[str, Any] = {k: torch.cat(v, dim=-1) for k, v in values.items() if isinstance(v[0], Tensor)}
    return replace(parts[0], **joined).map(Tensor.contiguous)


def _select_classes(embedding: Embedding, by_class: Tensor) -> Tensor:
    """Return the rows [q, m, n] of ``by_class`` [C, m, n] for the classes that each embedding uses."""
    if embedding.classes is None:
        return by_class
    return by_class.gather(0, embedding.classes[:, None].expand(-1, by_class.shape[1], -1))


def _contrast(embedding: Embedding, by_class: Tensor) -> Tensor:
    """Return ``A @ by_class``, [r, m, n], for ``by_class`` [q, m, n]; overwrite ``by_class``."""
    return contrasts.apply(embedding.probabilities, by_class, embedding.weighting)


def dense(embedding: Embedding) -> Tensor:
    """Return V itself, [n, r, k - E]."""
    p, n, rows = embedding.probabilities, embedding.hidden.shape[1], embedding.rows
    contrast_rows = contrasts.dense(p, embedding.weighting)
    if embedding.classes is not None:
        all_classes = contrast_rows.new_zeros(rows, embedding.num_classes, n)
        contrast_rows = all_classes.scatter_(1, embedding.classes.expand(rows, -1, -1), contrast_rows)
    head = contrast_rows[:, :-1, None] * embedding.hidden
    return torch.cat([head.flatten(1, 2), embedding.body], dim=1).permute(2, 0, 1)


def every_column(embedding: Embedding) -> Tensor:
    """Return V with all columns, those of the last class included, [n, r, k]."""
    v, width = dense(embedding), len(embedding.hidden)
    head, body = v.split([embedding.head_size, embedding.body.shape[1]], dim=2)
    last = -head.unflatten(2, (embedding.num_classes - 1, width)).sum(2)
    return torch.cat([head, last, body], dim=2)


def add_identity(matrix: Tensor, weight: float, num_classes: int, width: int) -> None:
    """Add to ``matrix`` [k - E, k - E], in place, the equivalent of ``weight`` times the identity of all k columns.

    This is ``weight (L L^T)^-1``, where L [k - E, k] maps V to all k columns (docs/method.md, section 4). Between the
    classes of the last layer, ``(L L^T)^-1 = I - 1 1^T / C``.
    """
    matrix.diagonal().add_(weight)
    head_size = (num_classes - 1) * width
    head = matrix[:head_size, :head_size].view(num_classes - 1, width, num_classes - 1, width)
    head.diagonal(dim1=1, dim2=3).sub_(weight / num_classes)


def product(embedding: Embedding, matrix: Tensor) -> Tensor:
    """Return ``V @ matrix`` for ``matrix`` [k - E, m]: [r, m, n], in O(n (r k_body + C E) m)."""
    head = matrix[: embedding.head_size].view(embedding.num_classes - 1, len(embedding.hidden), matrix.shape[1])
    result = _contrast(embedding, _select_classes(embedding, _by_class(head.mT, embedding.hidden)))
    if embedding.body.shape[1]:
        result.baddbmm_(matrix[embedding.head_size :].mT.expand(len(result), -1, -1), embedding.body)
    return result


def _by_class(head: Tensor, hidden: Tensor) -> Tensor:
    """Return ``head`` [C - 1, m, E] times ``hidden`` [E, n] for each class, and zero for the last class: [C, m, n]."""
    result = hidden.new_empty(len(head) + 1, head.shape[1], hidden.shape[1])
    torch.mm(head.flatten(0, 1), hidden, out=result[:-1].flatten(0, 1))
    result[-1] = 0
    return result


def _images_with_class(embedding: Embedding, o: int) -> tuple[int | Tensor, slice | Tensor]:
    """Return two indices: of class o among the classes of each image that uses it, and of these images."""
    if embedding.classes is None:
        return o, slice(None)
    places, images = (embedding.classes == o).nonzero(as_tuple=True)
    return places, images


def quadratic(embedding: Embedding, matrix: Tensor) -> Tensor:
    """Return ``V @ matrix @ V^T`` for a symmetric ``matrix`` [k - E, k - E]: [r, r, n]."""
    stored_classes, (q, n) = embedding.num_classes - 1, embedding.probabilities.shape
    hidden, body, head_size = embedding.hidden, embedding.body, embedding.head_size
    width = len(hidden)
    pairs = matrix[:head_size, :head_size].view(stored_classes, width, stored_classes, width)
    head = hidden.new_zeros(q, q, n)
    for o in range(stored_classes):  # head[o, o'] is h^T pairs[o, :, o'] h, or zero if o or o' is the last class
        if embedding.classes is None:  # every pair of classes once
            by_class = (pairs[o, :, o:].flatten(1).mT @ hidden).view(stored_classes - o, width, n)
            head[o, o:-1] = head[o:-1, o] = (by_class * hidden).sum(1)
        else:
            places, images = _images_with_class(embedding, o)
            inputs = hidden[:, images]
            by_class = inputs.new_zeros(stored_classes + 1, inputs.shape[1])
            products = (pairs[o].flatten(1).mT @ inputs).view(stored_classes, width, inputs.shape[1])
            by_class[:-1] = (products * inputs).sum(1)
            head[places, :, images] = by_class.gather(0, embedding.classes[:, images]).mT
    if embedding.classes is not None:
        head = (head + head.transpose(0, 1)) / 2  # the two entries of a pair are rounded differently
    result = _contrast(embedding, _contrast(embedding, head).transpose(0, 1).contiguous())
    if body.shape[1]:
        cross_block = matrix[:head_size, head_size:].view(stored_classes, width, body.shape[1]).mT
        head_products = _contrast(embedding, _select_classes(embedding, _by_class(cross_block, hidden)))
        for r in range(embedding.rows):
            # The products are added with their transpose, so they contain half of the body's symmetric term.
            half = torch.addmm(head_products[r], matrix[head_size:, head_size:], body[r], alpha=0.5)
            products = torch.stack([(half * body_row).sum(0) for body_row in body])
            result[r] += products
            result[:, r] += products
    return result


def information_diagonal(embedding: Embedding) -> Tensor:
    """Return the diagonal of ``information``, [k - E] in float64, without forming the matrix."""
    head = contrasts.dense(embedding.probabilities, embedding.weighting).square().sum(0)
    if embedding.classes is not None:
        head = head.new_zeros(embedding.num_classes, head.shape[1]).scatter_(0, embedding.classes, head)
    return torch.cat(
        [
            (head[:-1].double() @ embedding.hidden.double().square().mT).flatten(),
            embedding.body.double().square().sum((0, 2)),
        ]
    )


def information(embedding: Embedding) -> Tensor:
    """Return the sum over images of ``V^T V``: [k - E, k - E] in float64."""
    stored_classes, hidden, body = embedding.num_classes - 1, embedding.hidden, embedding.body
    width, head_size = len(hidden), embedding.head_size
    result = torch.zeros(embedding.size, embedding.size, dtype=torch.float64, device=hidden.device)
    contrast_rows = contrasts.dense(embedding.probabilities, embedding.weighting)
    # For each image, the block of the last layer is the Kronecker product of A^T A [q, q] and h h^T, and the block
    # V_head^T V_body is the outer product of h and A^T V_body.
    covariance = torch.einsum("ron,rpn->opn", contrast_rows, contrast_rows)
    class_gradients = contrasts.apply_transposed(embedding.probabilities, body, embedding.weighting)
    head = result[:head_size, :head_size].view(stored_classes, width, stored_classes, width)
    for o in range(stored_classes):
        places, images = _images_with_class(embedding, o)
        inputs = hidden[:, images]
        if embedding.classes is None:
            coefficients, gradients = covariance[o, o:-1], class_gradients[o]
        else:
            coefficients = inputs.new_zeros(stored_classes + 1, inputs.shape[1])
            coefficients.scatter_(0, embedding.classes[:, images], covariance[places, :, images].mT)
            coefficients, gradients = coefficients[o:-1], class_gradients[places, :, images].mT
        block = ((coefficients[:, None] * inputs).flatten(0, 1) @ inputs.mT).view(stored_classes - o, width, width)
        head[o, :, o:] = block.transpose(0, 1)
        head[o:, :, o] = block
        if body.shape[1]:
            cross = inputs @ gradients.mT
            result[o * width : (o + 1) * width, head_size:] = cross
            result[head_size:, o * width : (o + 1) * width] = cross.mT
    if body.shape[1]:
        square = body.new_zeros(body.shape[1], body.shape[1])
        for first in range(0, body.shape[1], STRIP):  # upper triangle, in strips
            strip = square[first : first + STRIP, first:]
            for row in body:
                strip.addmm_(row[first : first + STRIP], row[first:].mT)
        result[head_size:, head_size:] = square.triu() + square.triu(1).mT
    return result

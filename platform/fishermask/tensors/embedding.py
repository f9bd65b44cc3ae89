"""Fisher embeddings kept by structure, and the three products the selection needs of them.

The embedding of an image is ``V`` [C, k]: row c is ``w_c * d log p_c / d theta_S`` over the masked parameters S, so
that ``V^T V`` is the image's Fisher information when ``w_c = sqrt(p_c)``. The last layer is linear, so its columns are
an outer product, ``V_head[c, (o, e)] = w_c (delta_co - p_o) h_e``: we keep p, w and h for it and dense numbers for the
body only: ``C * k_body + E + 2 C`` numbers an image in place of ``C * (k_body + C * E)``.

Columns are ordered head first, (o, e) with e fastest and a bias as the last e, then the body in the mask's order.

The images are the *last* axis of every tensor: all that is done image by image then runs along contiguous memory, and
all products are few large matrix products in place of many small ones.

With many classes an *approximation* may keep the q most probable classes of each image, renormalised, as if the others
could not occur: q rows in place of C, everywhere below. ``classes`` then says which they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fishermask.tensors.backprop import class_gradients, forward
from fishermask.tensors.layer_rules import masked_entries
from fishermask.tensors.layout import per_sample_gradients
from fishermask.tensors.mask import Mask, split_name

STRIP = 1024


@dataclass(frozen=True)
class Embedding:
    """Fisher embeddings of n images; q = C rows each, or fewer when only the most probable classes are kept."""

    probabilities: Tensor
    """[q, n]"""
    weights: Tensor
    """[q, n], the w_c."""
    hidden: Tensor
    """[E, n]"""
    body: Tensor
    """[q, k_body, n]"""
    classes: Tensor | None = None
    """[q, n], the kept classes of each image; None if all are kept, in order."""
    all_classes: int = 0
    """C where ``classes`` are given."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Embedding":
        """The same with ``change`` applied to each of its tensors."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {key: change(value) for key, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def to(self, dtype: torch.dtype) -> "Embedding":
        """The same with its numbers, not its classes, in another type."""
        return self.map(lambda part: part.to(dtype) if part.is_floating_point() else part)

    @property
    def num_classes(self) -> int:
        """C, whether or not all are kept."""
        return len(self.probabilities) if self.classes is None else self.all_classes

    @property
    def head_size(self) -> int:
        return self.num_classes * len(self.hidden)

    @property
    def size(self) -> int:
        """k, the number of columns."""
        return self.head_size + self.body.shape[1]


def embed(
    model: nn.Module,
    images: Tensor,
    mask: Mask,
    class_weighting: str = "sqrt",
    top_classes: int | None = None,
    autocast: torch.dtype | None = None,
) -> Embedding:
    """Fisher embeddings of ``images`` [n, ...] under ``mask``.

    Args:
        class_weighting: ``sqrt``: w_c = sqrt(p_c), so that V^T V is the Fisher information. ``none``: w_c = 1, as the
            paper's released code has it.
        top_classes: q, an approximation: the other classes count as impossible.
        autocast: layers compute in this type; what they give is kept in the images' type.

    The rows of V are linearly dependent, ``sum_c (p_c / w_c) V_c = sum_c p_c d log p_c = 0``, so the row of each
    image's most probable class follows from the others, and C - 1 backward passes do. Its divisor is the largest there
    is: no accuracy is lost.
    """
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        run = forward(model, images, mask.layout.head, mask.layers)
    dtype, every = images.dtype, torch.arange(len(images), device=images.device)
    probabilities = run.probabilities
    order = slot = probabilities.argsort(descending=True, stable=True)
    kept = None
    if top_classes is not None and top_classes < probabilities.shape[1]:
        kept = order[:, :top_classes].sort().values
        probabilities = torch.zeros_like(probabilities).scatter_(1, kept, probabilities.gather(1, kept))
        probabilities /= probabilities.sum(1, keepdim=True)
        order = order[:, :top_classes]
        slot = torch.searchsorted(kept, order.contiguous())  # row of a class in ``body``
    weights = probabilities.sqrt() if class_weighting == "sqrt" else torch.ones_like(probabilities)
    share = weights if class_weighting == "sqrt" else probabilities  # p / w
    body = probabilities.new_zeros(len(images), order.shape[1], mask.body_size)
    if mask.entries:
        modules = dict(model.named_modules())
        pieces = {}
        for name, entries in mask.entries.items():
            layer, leaf = split_name(name)
            if name not in mask.slow:
                pieces[name] = masked_entries(modules[layer], run.inputs[layer].to(dtype), leaf, entries)
        for i, (classes, cotangent, gradients) in enumerate(
            class_gradients(run, probabilities, weights, order[:, 1:]), start=1
        ):
            slow = per_sample_gradients(model, images, mask.slow, cotangent)
            row = torch.cat(
                [
                    slow[name][:, entries] if name in slow else pieces[name](gradients[split_name(name)[0]].to(dtype))
                    for name, entries in mask.entries.items()
                ],
                dim=1,
            )
            body[every, slot[:, i]] = row
            body[every, slot[:, 0]] -= (share[every, classes] / share[every, order[:, 0]])[:, None] * row
    found = Embedding(probabilities.mT, weights.mT, run.hidden.mT, body.permute(1, 2, 0))
    if kept is None:
        return found
    probabilities, weights = probabilities.gather(1, kept), weights.gather(1, kept)
    return replace(
        found, probabilities=probabilities.mT, weights=weights.mT, classes=kept.mT, all_classes=run.logits.shape[1]
    )


def take(embedding: Embedding, rows: slice | Tensor) -> Embedding:
    """The embeddings of some of the images."""
    return embedding.map(lambda part: part[..., rows])


def concatenate(parts: list[Embedding]) -> Embedding:
    """The embeddings of ``parts`` one after the other, images contiguous."""
    values = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Embedding)}
    joined: dict[str, Any] = {k: torch.cat(v, dim=-1) for k, v in values.items() if isinstance(v[0], Tensor)}
    return replace(parts[0], **joined).map(Tensor.contiguous)


def _kept(embedding: Embedding, by_class: Tensor) -> Tensor:
    """The rows [q, m, n] that the images keep of ``by_class`` [C, m, n]."""
    if embedding.classes is None:
        return by_class
    return by_class.gather(0, embedding.classes[:, None].expand(-1, by_class.shape[1], -1))


def _mix(embedding: Embedding, by_class: Tensor) -> Tensor:
    """``diag(w) (I - 1 p^T)`` applied to the class axis, in place, of ``by_class`` [q, m, n]."""
    mean = (embedding.probabilities[:, None] * by_class).sum(0)
    return by_class.sub_(mean).mul_(embedding.weights[:, None])


def dense(embedding: Embedding) -> Tensor:
    """V itself, [n, q, k]."""
    rows, n = embedding.probabilities.shape
    p, w, hidden = embedding.probabilities.mT, embedding.weights.mT, embedding.hidden.mT
    mixing = w[:, :, None] * (torch.eye(rows, dtype=p.dtype, device=p.device) - p[:, None, :])
    if embedding.classes is not None:
        columns = embedding.classes.mT[:, None, :].expand(-1, rows, -1)
        mixing = mixing.new_zeros(n, rows, embedding.num_classes).scatter_(2, columns, mixing)
    head = mixing[..., None] * hidden[:, None, None, :]
    return torch.cat([head.reshape(n, rows, -1), embedding.body.permute(2, 0, 1)], dim=2)


def product(embedding: Embedding, matrix: Tensor) -> Tensor:
    """``V @ matrix`` for ``matrix`` [k, m]: [q, m, n], in O(n (q k_body + C E) m)."""
    num_classes, n = embedding.num_classes, embedding.hidden.shape[1]
    head = matrix[: embedding.head_size].view(num_classes, len(embedding.hidden), matrix.shape[1])
    by_class = head.mT.flatten(0, 1) @ embedding.hidden
    result = _mix(embedding, _kept(embedding, by_class.view(num_classes, matrix.shape[1], n)))
    if embedding.body.shape[1]:
        result.baddbmm_(matrix[embedding.head_size :].mT.expand(len(result), -1, -1), embedding.body)
    return result


def _keeping(embedding: Embedding, o: int) -> tuple[int | Tensor, slice | Tensor]:
    """The images that keep class o, and the row it has in each: (rows, images), to index the first and last axis by."""
    if embedding.classes is None:
        return o, slice(None)
    rows, images = (embedding.classes == o).nonzero(as_tuple=True)
    return rows, images


def quadratic(embedding: Embedding, matrix: Tensor) -> Tensor:
    """``V @ matrix @ V^T`` for a symmetric ``matrix`` [k, k]: [q, q, n]."""
    num_classes, (q, n) = embedding.num_classes, embedding.probabilities.shape
    hidden, body, head_size = embedding.hidden, embedding.body, embedding.head_size
    width = len(hidden)
    pairs = matrix[:head_size, :head_size].view(num_classes, width, num_classes, width)
    head = hidden.new_empty(q, q, n)
    for o in range(num_classes):  # h^T matrix[o, o'] h
        if embedding.classes is None:  # each pair of classes once
            right = (pairs[o, :, o:].flatten(1).mT @ hidden).view(num_classes - o, width, n)
            head[o, o:] = head[o:, o] = (right * hidden).sum(1)
        else:
            rows, images = _keeping(embedding, o)
            own = hidden[:, images]
            by_class = ((pairs[o].flatten(1).mT @ own).view(num_classes, width, own.shape[1]) * own).sum(1)
            head[rows, :, images] = by_class.gather(0, embedding.classes[:, images]).mT
    if embedding.classes is not None:
        head = (head + head.transpose(0, 1)) / 2  # the same pair was rounded in two ways
    result = _mix(embedding, _mix(embedding, head).transpose(0, 1).contiguous())
    if body.shape[1]:
        across = matrix[:head_size, head_size:].view(num_classes, width, body.shape[1]).mT.flatten(0, 1) @ hidden
        mixed = _mix(embedding, _kept(embedding, across.view(num_classes, body.shape[1], n)))
        for c in range(q):
            # Cross terms and their transpose, and the body's own, which count once: half of them on each side.
            right = torch.addmm(mixed[c], matrix[head_size:, head_size:], body[c], alpha=0.5)
            products = torch.stack([(right * other).sum(0) for other in body])
            result[c] += products
            result[:, c] += products
    return result


def information_diagonal(embedding: Embedding) -> Tensor:
    """The diagonal of ``information``, [k] in float64, without the rest of it."""
    p, w = embedding.probabilities, embedding.weights
    squared = w.square()
    # sum_c w_c^2 (delta_co - p_o)^2 for each kept class o
    between = squared * (1 - 2 * p) + squared.sum(0) * p.square()
    head = between.new_zeros(embedding.num_classes, p.shape[1])
    head = between if embedding.classes is None else head.scatter_(0, embedding.classes, between)
    return torch.cat(
        [
            (head.double() @ embedding.hidden.double().square().mT).flatten(),
            embedding.body.double().square().sum((0, 2)),
        ]
    )


def information(embedding: Embedding) -> Tensor:
    """Sum over images of ``V^T V``: [k, k] in float64."""
    num_classes, q = embedding.num_classes, len(embedding.probabilities)
    p, w, hidden, body = embedding.probabilities, embedding.weights, embedding.hidden, embedding.body
    width, head_size = len(hidden), embedding.head_size
    result = torch.zeros(embedding.size, embedding.size, dtype=torch.float64, device=hidden.device)
    mixing = torch.eye(q, dtype=p.dtype, device=p.device)[:, :, None] - p
    # B = A^T diag(w^2) A [q, q, n]; the head block is sum_n B_n (x) h_n h_n^T.
    between = torch.einsum("con,cpn->opn", mixing * w.square()[:, None], mixing)
    total = (w[:, None] * body).sum(0)
    head = result[:head_size, :head_size].view(num_classes, width, num_classes, width)
    for o in range(num_classes):
        rows, images = _keeping(embedding, o)
        own = hidden[:, images]
        if embedding.classes is None:
            coefficients, gradients = between[o, o:], body[o]
        else:
            coefficients = own.new_zeros(num_classes, own.shape[1])
            coefficients = coefficients.scatter_(0, embedding.classes[:, images], between[rows, :, images].mT)[o:]
            gradients = body[rows, :, images].mT
        block = ((coefficients[:, None] * own).flatten(0, 1) @ own.mT).view(num_classes - o, width, width)
        head[o, :, o:] = block.transpose(0, 1)
        head[o:, :, o] = block
        if body.shape[1]:
            # V_head^T V_body is (A^T diag(w) body)_n (x) h_n, and row o of A^T diag(w) body is w_o body_o - p_o sum.
            cross = (own * w[rows, images]) @ gradients.mT - (own * p[rows, images]) @ total[:, images].mT
            result[o * width : (o + 1) * width, head_size:] = cross
            result[head_size:, o * width : (o + 1) * width] = cross.mT
    if body.shape[1]:
        square = body.new_zeros(body.shape[1], body.shape[1])
        for first in range(0, body.shape[1], STRIP):  # the upper triangle, in strips
            strip = square[first : first + STRIP, first:]
            for own in body:
                strip.addmm_(own[first : first + STRIP], own[first:].mT)
        result[head_size:, head_size:] = square.triu() + square.triu(1).mT
    return result

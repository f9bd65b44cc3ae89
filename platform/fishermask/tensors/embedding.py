"""Fisher embeddings kept by structure, and the three products the selection needs of them.

The embedding of an image is ``V = A J`` [R, k]: J is the gradient of its logits by the masked parameters, and A the
contrasts between its classes (``contrasts``), so that ``V^T V`` is the image's Fisher information with R = C - 1 rows.
The last layer is linear, so its columns are an outer product, ``V_head[r, (o, e)] = A_ro h_e``: we keep p, from which A
follows, and h for it and dense numbers for the body only: ``R k_body + E + C`` numbers an image in place of C k.

Contrasts sum to zero over the classes, so the columns of the last class are minus the sum of the others'. Matrices have
none for it: ``k - E`` columns, head first, (o, e) with e fastest and a bias as the last e, then the body in the mask's
order. What is the identity for all k is ``add_identity`` for those.

The images are the *last* axis of every tensor: all that is done image by image then runs along contiguous memory, and
all products are few large matrix products in place of many small ones.

With many classes an *approximation* may keep the q most probable classes of each image, renormalized, as if the others
could not occur: q in place of C, everywhere below. ``classes`` then says which they are.
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


@dataclass(frozen=True)
class Embedding:
    """Fisher embeddings of n images, with q = C classes or fewer when only the most probable are kept."""

    probabilities: Tensor
    """[q, n]"""
    hidden: Tensor
    """[E, n]"""
    body: Tensor
    """[R, k_body, n]"""
    classes: Tensor | None = None
    """[q, n], the kept classes of each image; None if all are kept, in order."""
    all_classes: int = 0
    """C where ``classes`` are given."""
    weighting: Weighting = "sqrt"

    def map(self, change: Callable[[Tensor], Tensor]) -> "Embedding":
        """The same with ``change`` applied to each of its tensors."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {key: change(value) for key, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def to(self, dtype: torch.dtype) -> "Embedding":
        """The same with its numbers, not its classes, in another type."""
        return self.map(lambda part: part.to(dtype) if part.is_floating_point() else part)

    @property
    def rows(self) -> int:
        """R, the number of rows."""
        return len(self.body)

    @property
    def num_classes(self) -> int:
        """C, whether or not all are kept."""
        return len(self.probabilities) if self.classes is None else self.all_classes

    @property
    def head_size(self) -> int:
        """Columns of the last layer, without those of the last class."""
        return (self.num_classes - 1) * len(self.hidden)

    @property
    def size(self) -> int:
        """Columns in all, k - E."""
        return self.head_size + self.body.shape[1]


def embed(
    model: nn.Module,
    images: Tensor,
    mask: Mask,
    weighting: Weighting = "sqrt",
    top_classes: int | None = None,
    autocast: torch.dtype | None = None,
) -> Embedding:
    """Fisher embeddings of ``images`` [n, ...] under ``mask``.

    Args:
        weighting: ``sqrt``: V^T V is the Fisher information. ``none``: classes count alike, however probable, as the
            paper's released code has it.
        top_classes: q, an approximation: the other classes count as impossible.
        autocast: layers compute in this type; what they give is kept in the images' type.
    """
    count, images = len(images), pair(images)
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        run = forward(model, images, mask.plan.head, mask.layers)
    p, kept = run.probabilities, None
    if top_classes is not None and top_classes < p.shape[1]:
        kept = p.argsort(descending=True, stable=True)[:, :top_classes].sort().values
        p = p.gather(1, kept)
        p = p / p.sum(1, keepdim=True)
    rows = contrasts.count(p.shape[1], weighting)
    body = p.new_empty(rows, mask.body_size, len(images))
    if mask.entries:
        cotangents = contrasts.dense(p.mT, weighting).permute(0, 2, 1).contiguous()
        if kept is not None:
            everything = cotangents.new_zeros(rows, *run.logits.shape)
            cotangents = everything.scatter_(2, kept.expand(rows, -1, -1), cotangents)
        _fill_body(body, model, images, mask, run, cotangents)
    result = Embedding(
        p.mT,
        run.hidden.mT,
        body,
        None if kept is None else kept.mT,
        0 if kept is None else run.logits.shape[1],
        weighting,
    )
    return result if count == len(images) else take(result, slice(count)).map(Tensor.contiguous)


def _fill_body(
    body: Tensor, model: nn.Module, images: Tensor, mask: Mask, run: ForwardPass, cotangents: Tensor
) -> None:
    """Write the gradients of the logits, weighted by ``cotangents`` [R, n, C], to ``body`` [R, k_body, n]."""
    modules, columns, start = dict(model.named_modules()), {}, 0
    for name, entries in mask.entries.items():
        columns[name] = slice(start, start + len(entries))
        start += len(entries)
    slow = [name for name in columns if name in mask.slow or split_name(name)[0] in run.irregular]
    pieces = {}
    for name in columns:
        layer, leaf = split_name(name)
        if name not in slow:
            given = run.inputs[layer].to(images.dtype)
            pieces[name] = masked_entries(modules[layer], given, leaf, mask.entries[name])
    if pieces:
        for row, gradients in zip(body, output_gradients(run, cotangents), strict=True):
            for name, piece in pieces.items():
                row[columns[name]] = piece(gradients[split_name(name)[0]].to(images.dtype)).mT
    for r, part, found in slow_gradients(model, images, slow, cotangents, mask.plan.vectorized):
        for name, gradient in found.items():
            body[r, columns[name], part] = gradient[:, mask.entries[name]].mT


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


def _contrast(embedding: Embedding, by_class: Tensor) -> Tensor:
    """The contrasts [R, m, n] of ``by_class`` [q, m, n], in its memory."""
    return contrasts.apply(embedding.probabilities, by_class, embedding.weighting)


def dense(embedding: Embedding) -> Tensor:
    """V itself, [n, R, k - E]."""
    p, n, rows = embedding.probabilities, embedding.hidden.shape[1], embedding.rows
    between = contrasts.dense(p, embedding.weighting)
    if embedding.classes is not None:
        everything = between.new_zeros(rows, embedding.num_classes, n)
        between = everything.scatter_(1, embedding.classes.expand(rows, -1, -1), between)
    head = between[:, :-1, None] * embedding.hidden
    return torch.cat([head.flatten(1, 2), embedding.body], dim=1).permute(2, 0, 1)


def every_column(embedding: Embedding) -> Tensor:
    """V with the columns of the last class, [n, R, k]."""
    v, width = dense(embedding), len(embedding.hidden)
    head, body = v.split([embedding.head_size, embedding.body.shape[1]], dim=2)
    last = -head.unflatten(2, (embedding.num_classes - 1, width)).sum(2)
    return torch.cat([head, last, body], dim=2)


def add_identity(matrix: Tensor, weight: float, num_classes: int, width: int) -> None:
    """Add to ``matrix`` [k - E, k - E], in place, what ``weight`` times the identity is to all k columns.

    With S [k - E, k] the map that gives the last class minus the sum of the others, ``V_all = V S``, and for all else
    that is computed of them: ``S (w I + S^T X S)^-1 S^T = (w (S S^T)^-1 + X)^-1``. Between the classes of the last
    layer ``(S S^T)^-1 = I - 1 1^T / C``.
    """
    matrix.diagonal().add_(weight)
    head_size = (num_classes - 1) * width
    head = matrix[:head_size, :head_size].view(num_classes - 1, width, num_classes - 1, width)
    head.diagonal(dim1=1, dim2=3).sub_(weight / num_classes)


def product(embedding: Embedding, matrix: Tensor) -> Tensor:
    """``V @ matrix`` for ``matrix`` [k - E, m]: [R, m, n], in O(n (R k_body + C E) m)."""
    head = matrix[: embedding.head_size].view(embedding.num_classes - 1, len(embedding.hidden), matrix.shape[1])
    result = _contrast(embedding, _kept(embedding, _by_class(head.mT, embedding.hidden)))
    if embedding.body.shape[1]:
        result.baddbmm_(matrix[embedding.head_size :].mT.expand(len(result), -1, -1), embedding.body)
    return result


def _by_class(head: Tensor, hidden: Tensor) -> Tensor:
    """For each class ``head`` [C - 1, m, E] times ``hidden`` [E, n], and zero for the last: [C, m, n]."""
    found = hidden.new_empty(len(head) + 1, head.shape[1], hidden.shape[1])
    torch.mm(head.flatten(0, 1), hidden, out=found[:-1].flatten(0, 1))
    found[-1] = 0
    return found


def _keeping(embedding: Embedding, o: int) -> tuple[int | Tensor, slice | Tensor]:
    """The images that keep class o, and its place in each: (places, images), to index the first and last axis by."""
    if embedding.classes is None:
        return o, slice(None)
    places, images = (embedding.classes == o).nonzero(as_tuple=True)
    return places, images


def quadratic(embedding: Embedding, matrix: Tensor) -> Tensor:
    """``V @ matrix @ V^T`` for a symmetric ``matrix`` [k - E, k - E]: [R, R, n]."""
    others, (q, n) = embedding.num_classes - 1, embedding.probabilities.shape
    hidden, body, head_size = embedding.hidden, embedding.body, embedding.head_size
    width = len(hidden)
    pairs = matrix[:head_size, :head_size].view(others, width, others, width)
    head = hidden.new_zeros(q, q, n)
    for o in range(others):  # h^T matrix[o, o'] h, and zero where one of them is the last class
        if embedding.classes is None:  # each pair of classes once
            right = (pairs[o, :, o:].flatten(1).mT @ hidden).view(others - o, width, n)
            head[o, o:-1] = head[o:-1, o] = (right * hidden).sum(1)
        else:
            places, images = _keeping(embedding, o)
            own = hidden[:, images]
            by_class = own.new_zeros(others + 1, own.shape[1])
            by_class[:-1] = ((pairs[o].flatten(1).mT @ own).view(others, width, own.shape[1]) * own).sum(1)
            head[places, :, images] = by_class.gather(0, embedding.classes[:, images]).mT
    if embedding.classes is not None:
        head = (head + head.transpose(0, 1)) / 2  # the same pair was rounded in two ways
    result = _contrast(embedding, _contrast(embedding, head).transpose(0, 1).contiguous())
    if body.shape[1]:
        across = matrix[:head_size, head_size:].view(others, width, body.shape[1]).mT
        mixed = _contrast(embedding, _kept(embedding, _by_class(across, hidden)))
        for r in range(embedding.rows):
            # Cross terms and their transpose, and the body's own, which count once: half of them on each side.
            right = torch.addmm(mixed[r], matrix[head_size:, head_size:], body[r], alpha=0.5)
            products = torch.stack([(right * other).sum(0) for other in body])
            result[r] += products
            result[:, r] += products
    return result


def information_diagonal(embedding: Embedding) -> Tensor:
    """The diagonal of ``information``, [k - E] in float64, without the rest of it."""
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
    """Sum over images of ``V^T V``: [k - E, k - E] in float64."""
    others, hidden, body = embedding.num_classes - 1, embedding.hidden, embedding.body
    width, head_size = len(hidden), embedding.head_size
    result = torch.zeros(embedding.size, embedding.size, dtype=torch.float64, device=hidden.device)
    mixing = contrasts.dense(embedding.probabilities, embedding.weighting)
    # B = A^T A [q, q, n]; the head block is sum_n B_n (x) h_n h_n^T, and V_head^T V_body is (A^T V_body)_n (x) h_n.
    between = torch.einsum("ron,rpn->opn", mixing, mixing)
    across = contrasts.apply_transposed(embedding.probabilities, body, embedding.weighting)
    head = result[:head_size, :head_size].view(others, width, others, width)
    for o in range(others):
        places, images = _keeping(embedding, o)
        own = hidden[:, images]
        if embedding.classes is None:
            coefficients, gradients = between[o, o:-1], across[o]
        else:
            coefficients = own.new_zeros(others + 1, own.shape[1])
            coefficients = coefficients.scatter_(0, embedding.classes[:, images], between[places, :, images].mT)[o:-1]
            gradients = across[places, :, images].mT
        block = ((coefficients[:, None] * own).flatten(0, 1) @ own.mT).view(others - o, width, width)
        head[o, :, o:] = block.transpose(0, 1)
        head[o:, :, o] = block
        if body.shape[1]:
            cross = own @ gradients.mT
            result[o * width : (o + 1) * width, head_size:] = cross
            result[head_size:, o * width : (o + 1) * width] = cross.mT
    if body.shape[1]:
        square = body.new_zeros(body.shape[1], body.shape[1])
        for first in range(0, body.shape[1], STRIP):  # the upper triangle, in strips
            strip = square[first : first + STRIP, first:]
            for row in body:
                strip.addmm_(row[first : first + STRIP], row[first:].mT)
        result[head_size:, head_size:] = square.triu() + square.triu(1).mT
    return result

"""Fisher embeddings kept by structure, and the three products the selection needs of them.

The embedding of an image is ``V`` [C, k]: row c is ``w_c * d log p_c / d theta_S`` over the masked parameters S, so
that ``V^T V`` is the image's Fisher information when ``w_c = sqrt(p_c)``. The last layer is linear, so its columns are
an outer product, ``V_head[c, (o, e)] = w_c (delta_co - p_o) h_e``: we keep p, w and h for it and dense numbers for the
body only: ``C * k_body + E + 2 C`` numbers an image in place of ``C * (k_body + C * E)``.

Columns are ordered head first, (o, e) with e fastest and a bias as the last e, then the body in the mask's order.

The images are the *last* axis of every tensor: all that is done image by image then runs along contiguous memory, and
all products are few large matrix products in place of many small ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fishermask.tensors.backprop import class_gradients, forward
from fishermask.tensors.layer_rules import masked_entries
from fishermask.tensors.layout import per_sample_gradients
from fishermask.tensors.mask import Mask, split_name

STRIP = 1024


class Embedding(NamedTuple):
    """Fisher embeddings of n images."""

    probabilities: Tensor
    """[C, n]"""
    weights: Tensor
    """[C, n], the w_c."""
    hidden: Tensor
    """[E, n]"""
    body: Tensor
    """[C, k_body, n]"""

    @property
    def head_size(self) -> int:
        return self.probabilities.shape[0] * self.hidden.shape[0]

    @property
    def size(self) -> int:
        """k, the number of columns."""
        return self.head_size + self.body.shape[1]


def embed(model: nn.Module, images: Tensor, mask: Mask, class_weighting: str = "sqrt") -> Embedding:
    """Fisher embeddings of ``images`` [n, ...] under ``mask``.

    Args:
        class_weighting: ``sqrt``: w_c = sqrt(p_c), so that V^T V is the Fisher information. ``none``: w_c = 1, as the
            paper's released code has it.

    The rows of V are linearly dependent, ``sum_c (p_c / w_c) V_c = sum_c p_c d log p_c = 0``, so the row of each
    image's most probable class follows from the others, and C - 1 backward passes do. Its divisor is the largest there
    is: no accuracy is lost.
    """
    run = forward(model, images, mask.layout.head, mask.layers)
    probabilities = run.probabilities
    weights = probabilities.sqrt() if class_weighting == "sqrt" else torch.ones_like(probabilities)
    share = weights if class_weighting == "sqrt" else probabilities  # p / w
    body = probabilities.new_zeros(*probabilities.shape, mask.body_size)
    if mask.entries:
        modules = dict(model.named_modules())
        pieces = {}
        for name, entries in mask.entries.items():
            layer, leaf = split_name(name)
            if name not in mask.slow:
                pieces[name] = masked_entries(modules[layer], run.inputs[layer], leaf, entries)
        order = probabilities.argsort(descending=True, stable=True)
        every = torch.arange(len(images), device=images.device)
        for classes, cotangent, gradients in class_gradients(run, weights, order[:, 1:]):
            slow = per_sample_gradients(model, images, mask.slow, cotangent)
            row = torch.cat(
                [
                    slow[name][:, entries] if name in slow else pieces[name](gradients[split_name(name)[0]])
                    for name, entries in mask.entries.items()
                ],
                dim=1,
            )
            body[every, classes] = row
            body[every, order[:, 0]] -= (share[every, classes] / share[every, order[:, 0]])[:, None] * row
    return Embedding(probabilities.mT, weights.mT, run.hidden.mT, body.permute(1, 2, 0))


def take(embedding: Embedding, rows: slice | Tensor) -> Embedding:
    """The embeddings of some of the images."""
    return Embedding(*(part[..., rows] for part in embedding))


def concatenate(parts: list[Embedding]) -> Embedding:
    """The embeddings of ``parts`` one after the other, images contiguous."""
    return Embedding(*(torch.cat(fields, dim=-1).contiguous() for fields in zip(*parts, strict=True)))


def _mix(embedding: Embedding, by_class: Tensor) -> Tensor:
    """``diag(w) (I - 1 p^T)`` applied to the class axis, in place, of ``by_class`` [C, m, n]."""
    mean = (embedding.probabilities[:, None] * by_class).sum(0)
    return by_class.sub_(mean).mul_(embedding.weights[:, None])


def dense(embedding: Embedding) -> Tensor:
    """V itself, [n, C, k]."""
    num_classes, n = embedding.probabilities.shape
    p, w, hidden = embedding.probabilities.mT, embedding.weights.mT, embedding.hidden.mT
    mixing = w[:, :, None] * (torch.eye(num_classes, dtype=p.dtype, device=p.device) - p[:, None, :])
    head = mixing[..., None] * hidden[:, None, None, :]
    return torch.cat([head.reshape(n, num_classes, -1), embedding.body.permute(2, 0, 1)], dim=2)


def product(embedding: Embedding, matrix: Tensor) -> Tensor:
    """``V @ matrix`` for ``matrix`` [k, m]: [C, m, n], in O(n C (k_body + E) m)."""
    num_classes, n = embedding.probabilities.shape
    head = matrix[: embedding.head_size].view(num_classes, len(embedding.hidden), matrix.shape[1])
    by_class = head.mT.flatten(0, 1) @ embedding.hidden
    result = _mix(embedding, by_class.view(num_classes, matrix.shape[1], n))
    if embedding.body.shape[1]:
        result.baddbmm_(matrix[embedding.head_size :].mT.expand(num_classes, -1, -1), embedding.body)
    return result


def quadratic(embedding: Embedding, matrix: Tensor) -> Tensor:
    """``V @ matrix @ V^T`` for a symmetric ``matrix`` [k, k]: [C, C, n]."""
    num_classes, n = embedding.probabilities.shape
    hidden, body, head_size = embedding.hidden, embedding.body, embedding.head_size
    width = len(hidden)
    pairs = matrix[:head_size, :head_size].view(num_classes, width, num_classes, width)
    head = hidden.new_empty(num_classes, num_classes, n)
    for o in range(num_classes):  # h^T matrix[o, o'] h, each pair of classes once
        right = (pairs[o, :, o:].flatten(1).mT @ hidden).view(num_classes - o, width, n)
        head[o, o:] = head[o:, o] = (right * hidden).sum(1)
    result = _mix(embedding, _mix(embedding, head).transpose(0, 1).contiguous())
    if body.shape[1]:
        across = matrix[:head_size, head_size:].view(num_classes, width, body.shape[1]).mT.flatten(0, 1) @ hidden
        mixed = _mix(embedding, across.view(num_classes, body.shape[1], n))
        for c in range(num_classes):
            # Cross terms and their transpose, and the body's own, which count once: half of them on each side.
            right = torch.addmm(mixed[c], matrix[head_size:, head_size:], body[c], alpha=0.5)
            products = torch.stack([(right * other).sum(0) for other in body])
            result[c] += products
            result[:, c] += products
    return result


def information(embedding: Embedding) -> Tensor:
    """Sum over images of ``V^T V``: [k, k] in float64."""
    num_classes, n = embedding.probabilities.shape
    p, w, hidden, body = embedding
    width, head_size = len(hidden), embedding.head_size
    result = torch.zeros(embedding.size, embedding.size, dtype=torch.float64, device=hidden.device)
    mixing = torch.eye(num_classes, dtype=p.dtype, device=p.device)[:, :, None] - p
    # B = A^T diag(w^2) A [C, C, n]; the head block is sum_n B_n (x) h_n h_n^T.
    between = torch.einsum("con,cpn->opn", mixing * w.square()[:, None], mixing)
    head = result[:head_size, :head_size].view(num_classes, width, num_classes, width)
    for o in range(num_classes):
        scaled = (between[o, o:, None] * hidden).flatten(0, 1) @ hidden.mT
        block = scaled.view(num_classes - o, width, width)
        head[o, :, o:] = block.transpose(0, 1)
        head[o:, :, o] = block
    if body.shape[1]:
        # V_head^T V_body is (A^T diag(w) body)_n (x) h_n, and row o of A^T diag(w) body is w_o body_o - p_o sum.
        total = (w[:, None] * body).sum(0)
        for o in range(num_classes):
            cross = (hidden * w[o]) @ body[o].mT - (hidden * p[o]) @ total.mT
            result[o * width : (o + 1) * width, head_size:] = cross
            result[head_size:, o * width : (o + 1) * width] = cross.mT
        square = body.new_zeros(body.shape[1], body.shape[1])
        for first in range(0, body.shape[1], STRIP):  # the upper triangle, in strips
            strip = square[first : first + STRIP, first:]
            for rows in body:
                strip.addmm_(rows[first : first + STRIP], rows[first:].mT)
        result[head_size:, head_size:] = square.triu() + square.triu(1).mT
    return result

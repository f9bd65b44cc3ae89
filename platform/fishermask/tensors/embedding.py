"""Fisher embeddings kept by structure, and the three products the selection needs of them.

The embedding of an image is ``V`` [C, k]: row c is ``w_c * d log p_c / d theta_S`` over the masked parameters S, so
that ``V^T V`` is the image's Fisher information when ``w_c = sqrt(p_c)``. The last layer is linear, so its columns are
an outer product, ``V_head[c, (o, e)] = w_c (delta_co - p_o) h_e``: we keep p, w and h for it and dense numbers for the
body only: ``C * k_body + E + 2 C`` numbers an image in place of ``C * (k_body + C * E)``.

Columns are ordered head first, (o, e) with e fastest and a bias as the last e, then the body in the mask's order.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fishermask.tensors.backprop import class_gradients, forward
from fishermask.tensors.layer_rules import masked_entries
from fishermask.tensors.mask import Mask, split_name


class Embedding(NamedTuple):
    """Fisher embeddings of n images."""

    probabilities: Tensor
    """[n, C]"""
    weights: Tensor
    """[n, C], the w_c."""
    hidden: Tensor
    """[n, E]"""
    body: Tensor
    """[n, C, k_body]"""

    @property
    def head_size(self) -> int:
        return self.probabilities.shape[1] * self.hidden.shape[1]

    @property
    def size(self) -> int:
        """k, the number of columns."""
        return self.head_size + self.body.shape[2]


def embed(model: nn.Module, images: Tensor, mask: Mask) -> Embedding:
    """Fisher embeddings of ``images`` [n, ...] under ``mask``, with w_c = sqrt(p_c)."""
    run = forward(model, images, mask.head, mask.layers)
    probabilities = run.probabilities
    weights = probabilities.sqrt()
    body = probabilities.new_empty(*probabilities.shape, mask.body_size)
    if mask.entries:
        modules = dict(model.named_modules())
        pieces = []
        for name, entries in mask.entries.items():
            layer, leaf = split_name(name)
            pieces.append((layer, masked_entries(modules[layer], run.inputs[layer], leaf, entries)))
        for c, gradients in enumerate(class_gradients(run, weights)):
            torch.cat([gradient_of(gradients[layer]) for layer, gradient_of in pieces], dim=1, out=body[:, c])
    return Embedding(probabilities, weights, run.hidden, body)


def take(embedding: Embedding, rows: slice | Tensor) -> Embedding:
    """The embeddings of some of the images."""
    return Embedding(*(part[rows] for part in embedding))


def concatenate(parts: list[Embedding]) -> Embedding:
    """The embeddings of ``parts`` one after the other."""
    return Embedding(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _mix(embedding: Embedding, by_class: Tensor) -> Tensor:
    """``diag(w) (I - 1 p^T)`` applied to the class axis of ``by_class`` [n, C, ...]."""
    shape = (*embedding.weights.shape, *[1] * (by_class.dim() - 2))
    mean = (embedding.probabilities.view(shape) * by_class).sum(1, keepdim=True)
    return embedding.weights.view(shape) * (by_class - mean)


def dense(embedding: Embedding) -> Tensor:
    """V itself, [n, C, k]."""
    n, num_classes = embedding.probabilities.shape
    eye = torch.eye(num_classes, dtype=embedding.hidden.dtype, device=embedding.hidden.device)
    mixing = embedding.weights[:, :, None] * (eye - embedding.probabilities[:, None, :])
    head = mixing[..., None] * embedding.hidden[:, None, None, :]
    return torch.cat([head.reshape(n, num_classes, -1), embedding.body], dim=2)


def product(embedding: Embedding, matrix: Tensor) -> Tensor:
    """``V @ matrix`` for ``matrix`` [k, m]: [n, C, m], in O(n C (k_body + E) m)."""
    n, num_classes = embedding.probabilities.shape
    head = matrix[: embedding.head_size].view(num_classes, embedding.hidden.shape[1], -1)
    by_class = embedding.hidden @ head.transpose(0, 1).flatten(1)
    result = _mix(embedding, by_class.view(n, num_classes, -1))
    if embedding.body.shape[2]:
        result += embedding.body @ matrix[embedding.head_size :]
    return result


def quadratic(embedding: Embedding, matrix: Tensor) -> Tensor:
    """``V @ matrix @ V^T`` for a symmetric ``matrix`` [k, k]: [n, C, C]."""
    n, num_classes = embedding.probabilities.shape
    hidden, body, head_size = embedding.hidden, embedding.body, embedding.head_size
    width = hidden.shape[1]
    pairs = matrix[:head_size, :head_size].view(num_classes, width, num_classes, width)
    head = hidden.new_empty(n, num_classes, num_classes)
    for o in range(num_classes):  # h^T matrix[o, o'] h, each pair of classes once
        right = (hidden @ pairs[o, :, o:].flatten(1)).view(n, num_classes - o, width)
        head[:, o, o:] = head[:, o:, o] = (right @ hidden[:, :, None])[..., 0]
    result = _mix(embedding, _mix(embedding, head).mT)
    if body.shape[2]:
        across = hidden @ matrix[:head_size, head_size:].view(num_classes, width, -1).transpose(0, 1).flatten(1)
        cross = _mix(embedding, across.view(n, num_classes, -1)) @ body.mT
        result = result + cross + cross.mT + (body @ matrix[head_size:, head_size:]) @ body.mT
    return result


def information(embedding: Embedding) -> Tensor:
    """Sum over images of ``V^T V``: [k, k] in float64."""
    n, num_classes = embedding.probabilities.shape
    hidden, body = embedding.hidden, embedding.body
    width, head_size = hidden.shape[1], embedding.head_size
    result = torch.zeros(embedding.size, embedding.size, dtype=torch.float64, device=hidden.device)
    squared = embedding.weights.square()
    eye = torch.eye(num_classes, dtype=hidden.dtype, device=hidden.device)
    mixing = eye - embedding.probabilities[:, None, :]
    # B = A^T diag(w^2) A [n, C, C]; the head block is sum_n B_n (x) h_n h_n^T.
    between = mixing.mT @ (squared[:, :, None] * mixing)
    head = result[:head_size, :head_size].view(num_classes, width, num_classes, width)
    for o in range(num_classes):
        for other in range(o, num_classes):
            block = hidden.mT @ (between[:, o, other, None] * hidden)
            head[o, :, other] = block
            head[other, :, o] = block.mT
    if body.shape[2]:
        # V_head^T V_body: h_n (x) (A^T diag(w) body)_n.
        mixed = (embedding.weights[:, :, None] * mixing).mT @ body
        cross = (hidden.mT @ mixed.flatten(1)).view(width, num_classes, -1).transpose(0, 1).flatten(0, 1)
        result[:head_size, head_size:] = cross
        result[head_size:, :head_size] = cross.mT
        rows = body.flatten(0, 1)
        result[head_size:, head_size:] = rows.mT @ rows
    return result

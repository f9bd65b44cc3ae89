"""Error of ``top_classes``, measured on a sample: approximate embeddings compared with exact ones."""

import torch
from torch import Tensor

from fishermask.tensors import contrasts
from fishermask.tensors.embedding import Embedding

MAX_ROWS = 1500
"""Rows of all exact embeddings of the sample. Systems of this size are solved in a few tenths of a second."""
MIN_IMAGES, MAX_IMAGES = 4, 64


def sample_size(rows: int) -> int:
    """Return the number of images to compare whose exact embeddings have ``rows`` rows each."""
    return max(MIN_IMAGES, min(MAX_IMAGES, MAX_ROWS // rows))


def row_products(embedding: Embedding) -> Tensor:
    """Return the inner products of all rows of V, of all images and over all k columns: [n r, n r].

    Computed from the structure of V: a row of the last layer's columns is an outer product, and the inner product of
    two outer products is the product of two inner products. V itself, n r k numbers, is never formed.
    """
    n, rows = embedding.hidden.shape[1], embedding.rows
    between = contrasts.dense(embedding.probabilities, embedding.weighting)
    if embedding.classes is not None:
        all_classes = between.new_zeros(rows, embedding.num_classes, n)
        between = all_classes.scatter_(1, embedding.classes.expand(rows, -1, -1), between)
    between = between.permute(2, 0, 1).flatten(0, 1)
    products = between @ between.mT
    products.view(n, rows, n, rows).mul_((embedding.hidden.mT @ embedding.hidden)[:, None, :, None])
    if embedding.body.shape[1]:
        body = embedding.body.permute(2, 0, 1).flatten(0, 1)
        products.addmm_(body, body.mT)
    return products


def covered_information(embedding: Embedding, damping: float) -> float:
    """Return ``tr((damping I + F)^-1 F)`` in float64, with F the mean information of the images."""
    # V V^T of all rows has the same nonzero eigenvalues as the sum of V^T V, and is small.
    inner = row_products(embedding.to(torch.float64)).div_(embedding.hidden.shape[1])
    damped = inner.clone()
    damped.diagonal().add_(damping)
    return float(torch.linalg.solve(damped, inner).trace())


def relative_error(exact: Embedding, approximate: Embedding, damping: float) -> float:
    """Return the relative error of ``covered_information`` of the ``approximate`` embeddings."""
    expected, actual = covered_information(exact, damping), covered_information(approximate, damping)
    return abs(actual - expected) / max(expected, 1e-300)  # a model that is certain of every image has no information

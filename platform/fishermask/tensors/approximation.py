"""Error of keeping few classes of each image, measured on a sample: exact embeddings against approximate ones."""

import torch
from torch import Tensor

from fishermask.tensors import contrasts
from fishermask.tensors.embedding import Embedding

MAX_ROWS = 1500
"""Rows of all exact embeddings of the sample. Systems of this size are solved in a few tenths of a second."""
FEWEST_IMAGES, MOST_IMAGES = 4, 64


def sample_size(rows: int) -> int:
    """Return the number of images to compare whose exact embeddings have ``rows`` rows each."""
    return max(FEWEST_IMAGES, min(MOST_IMAGES, MAX_ROWS // rows))


def row_products(embedding: Embedding) -> Tensor:
    """Return the inner products of all rows of V, of all images and over all k columns: [n R, n R].

    Computed from the structure of V: a row of the last layer's columns is an outer product, and the inner product of
    two outer products is the product of two inner products. V itself, n R k numbers, is never formed.
    """
    n, rows = embedding.hidden.shape[1], embedding.rows
    between = contrasts.dense(embedding.probabilities, embedding.weighting)
    if embedding.classes is not None:
        every_class = between.new_zeros(rows, embedding.num_classes, n)
        between = every_class.scatter_(1, embedding.classes.expand(rows, -1, -1), between)
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


def relative_error(exact: Embedding, rough: Embedding, damping: float) -> float:
    """Return the relative error of ``covered_information`` by the approximation in ``rough``."""
    expected, found = covered_information(exact, damping), covered_information(rough, damping)
    return abs(found - expected) / max(expected, 1e-300)  # a model that is certain of all has no information

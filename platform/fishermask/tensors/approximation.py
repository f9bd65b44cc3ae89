"""Error of ``top_classes``: comparison of approximate and exact embeddings on a sample of the pool."""

import torch
from torch import Tensor

from fishermask.tensors import contrasts
from fishermask.tensors.embedding import Embedding

MAX_ROWS = 1500
"""Largest number of rows of all exact embeddings together; such a system is solved in a few tenths of a second."""
MIN_IMAGES, MAX_IMAGES = 4, 64
"""Smallest and largest size of the sample."""


def sample_size(rows: int) -> int:
    """Return the number of images in the sample, if each exact embedding has ``rows`` rows."""
    return max(MIN_IMAGES, min(MAX_IMAGES, MAX_ROWS // rows))


def row_products(embedding: Embedding) -> Tensor:
    """Return the inner products of all rows of V of all images, over all k columns: [n r, n r].

    In the columns of the last layer, each row of V is an outer product, and the inner product of two outer products is
    the product of two inner products. So V itself, with its n r k numbers, is never formed.
    """
    n, rows = embedding.hidden.shape[1], embedding.rows
    contrast_rows = contrasts.dense(embedding.probabilities, embedding.weighting)
    if embedding.classes is not None:
        all_classes = contrast_rows.new_zeros(rows, embedding.num_classes, n)
        contrast_rows = all_classes.scatter_(1, embedding.classes.expand(rows, -1, -1), contrast_rows)
    contrast_rows = contrast_rows.permute(2, 0, 1).flatten(0, 1)
    products = contrast_rows @ contrast_rows.mT
    products.view(n, rows, n, rows).mul_((embedding.hidden.mT @ embedding.hidden)[:, None, :, None])
    if embedding.body.shape[1]:
        body = embedding.body.permute(2, 0, 1).flatten(0, 1)
        products.addmm_(body, body.mT)
    return products


def covered_information(embedding: Embedding, damping: float) -> float:
    """Return ``tr((damping I + F)^-1 F)`` in float64, with F the mean information of the images."""
    # V V^T, with the rows of all images in V, has the same nonzero eigenvalues as V^T V, and is small.
    inner = row_products(embedding.to(torch.float64)).div_(embedding.hidden.shape[1])
    damped = inner.clone()
    damped.diagonal().add_(damping)
    return float(torch.linalg.solve(damped, inner).trace())


def relative_error(exact: Embedding, approximate: Embedding, damping: float) -> float:
    """Return the relative error of ``covered_information`` for the ``approximate`` embeddings."""
    expected, actual = covered_information(exact, damping), covered_information(approximate, damping)
    return abs(actual - expected) / max(expected, 1e-300)  # a model that is certain of every image has no information

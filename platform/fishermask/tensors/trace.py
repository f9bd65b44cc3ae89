"""Choosing images one by one so that ``tr(M^-1 F)`` falls the most, without ever forming a k x k product per image.

``Objective`` is the coordinator's part, ``R = M^-1`` and ``H = R F R`` [k, k]. ``Scores`` is a shard's part, for each
of its images ``P = V R V^T`` and ``Q = V H V^T`` [C, C]. Adding an image with embedding V changes both by terms of rank
C (Woodbury), so a pick costs one structured product with 2 C columns over the pool. BAIT (Ash et al. 2021) defines the
objective.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fishermask.tensors.embedding import Embedding, dense, product, quadratic


class Update(NamedTuple):
    """What one pick changes, all that a shard must be told."""

    basis: Tensor
    """[k, 2 C]: U = R V^T beside T = H V^T, scaled as candidates are."""
    inner: Tensor
    """G = (I + V U)^-1, [C, C]."""
    middle: Tensor
    """s = V T, [C, C]."""


class Objective:
    """``tr(M^-1 F)`` and its inverse matrices, in float64.

    Args:
        start: M before any pick, symmetric positive definite, [k, k].
        target: F, [k, k].
        scale: every candidate's V counts ``scale`` times V.
    """

    def __init__(self, start: Tensor, target: Tensor, scale: float = 1.0) -> None:
        self.scale = scale
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(start.double()))
        self.sandwich = self.inverse @ target.double() @ self.inverse
        self.value = float((self.inverse * target).sum())

    def matrices(self) -> tuple[Tensor, Tensor]:
        """R and H as unscaled embeddings meet them: both times scale^2."""
        return self.inverse * self.scale**2, self.sandwich * self.scale**2

    def add(self, embedding: Embedding) -> Update:
        """Add the one image of ``embedding`` to M and return what the scores of all others need."""
        v = dense(embedding)[0].double() * self.scale
        u, t = self.inverse @ v.mT, self.sandwich @ v.mT
        eye = torch.eye(len(v), dtype=v.dtype, device=v.device)
        inner = torch.linalg.inv(eye + v @ u)
        middle = v @ t
        ug = u @ inner
        self.value -= float((inner * middle).sum())
        self.inverse -= ug @ u.mT
        change = t @ ug.mT
        self.sandwich -= change + change.mT - ug @ middle @ ug.mT
        return Update(torch.cat([u, t], dim=1) * self.scale, inner, middle)


class Scores(NamedTuple):
    """P and Q of n images, each [n, C, C]."""

    p: Tensor
    q: Tensor


def start_scores(embedding: Embedding, inverse: Tensor, sandwich: Tensor) -> Scores:
    """P and Q from ``Objective.matrices()``."""
    dtype = embedding.hidden.dtype
    return Scores(quadratic(embedding, inverse.to(dtype)), quadratic(embedding, sandwich.to(dtype)))


def advance(scores: Scores, embedding: Embedding, update: Update) -> Scores:
    """P and Q after a pick."""
    num_classes = scores.p.shape[1]
    dtype = scores.p.dtype
    both = product(embedding, update.basis.to(dtype))
    a, b = both[..., :num_classes], both[..., num_classes:]
    x = a @ update.inner.to(dtype)
    cross = b @ x.mT
    return Scores(scores.p - x @ a.mT, scores.q - cross - cross.mT + x @ update.middle.to(dtype) @ x.mT)


def gains(scores: Scores) -> Tensor:
    """By how much each image would lower ``tr(M^-1 F)``: ``tr((I + P)^-1 Q)``, [n]."""
    eye = torch.eye(scores.p.shape[1], dtype=scores.p.dtype, device=scores.p.device)
    return torch.linalg.solve(eye + scores.p, scores.q).diagonal(dim1=1, dim2=2).sum(-1)

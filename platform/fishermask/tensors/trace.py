"""Choosing images one by one so that ``tr(M^-1 F)`` falls the most, without ever forming a k x k product per image.

``Objective`` is the coordinator's part, ``R = M^-1`` and ``H = R F R``. ``Scores`` is a shard's part, for each
of its images ``P = V R V^T`` and ``Q = V H V^T`` [r, r], V having r = C - 1 rows. Adding an image changes both by terms
of rank r (Woodbury), so a pick costs one structured product with 2 r columns over the pool. BAIT (Ash et al. 2021)
defines the objective.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fishermask.tensors.embedding import Embedding, dense, information, product, quadratic

LAZY_PICKS = 16
"""Picks whose terms are applied to R and H together: more wastes time on the terms, fewer on moving the matrices."""
ERROR_VECTORS = 4
"""Random vectors that an error is estimated by."""


class Update(NamedTuple):
    """What one pick changes, all that a shard must be told."""

    basis: Tensor
    """[k - E, 2 r]: U = R V^T beside T = H V^T, scaled as candidates are."""
    inner: Tensor
    """G = (I + V U)^-1, [r, r]."""
    middle: Tensor
    """s = V T, [r, r]."""
    gain: float
    """By how much the trace falls."""


class Objective:
    """``tr(M^-1 F)`` and its inverse matrices, in float64.

    R and H are changed by every pick by a term of rank r and 2 r. The terms are gathered and applied to the k x k
    matrices ``LAZY_PICKS`` at a time: one large product moves each matrix through memory once, not once a pick.

    Args:
        start: M before any pick, symmetric positive definite, [k - E, k - E].
        target: F, [k - E, k - E].
        scale: every candidate's V counts ``scale`` times V.
        constant: what to add to the trace, before and after every pick.
        keep_inputs: whether to keep ``start`` and ``target``, which ``error`` and ``rebuild`` need.

    Raises:
        torch.linalg.LinAlgError: ``start`` is not positive definite.
    """

    def __init__(
        self, start: Tensor, target: Tensor, scale: float = 1.0, constant: float = 0.0, keep_inputs: bool = False
    ) -> None:
        self.scale, self.constant = scale, constant
        self._inputs = (start, target) if keep_inputs else None
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(start.double()))
        self.sandwich = self.inverse @ target.double() @ self.inverse
        self.value = float((self.inverse * target).sum()) + constant
        # R = inverse - sum ug u^T; H = sandwich - sum (y ug^T + ug y^T), with ug = U G, y = T - ug s / 2.
        # Their transposes, one pick's rows below the other's: u, ug and y, [3, LAZY_PICKS * r, k].
        self._terms = self.inverse.new_empty(3, 0, len(self.inverse))
        self._count = 0

    def matrices(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """R and H as unscaled embeddings meet them, both times scale^2: copies in ``dtype``."""
        self._gather()
        return self.inverse.to(dtype) * self.scale**2, self.sandwich.to(dtype) * self.scale**2

    def add(self, embedding: Embedding) -> Update:
        """Add the one image of ``embedding`` to M and return what the scores of all others need."""
        update = self.consider(embedding)
        self.apply(update)
        return update

    def remove(self, embedding: Embedding) -> Update:
        """Take the one image of ``embedding`` out of M again."""
        update = self.consider(embedding, -1.0)
        self.apply(update)
        return update

    def rebuild(self, embedding: Embedding) -> "Objective":
        """Return the objective with exactly the images of ``embedding`` added to ``start``, free of update errors.

        Raises:
            torch.linalg.LinAlgError: M is not positive definite.
        """
        assert self._inputs is not None
        start, target = self._inputs
        total = start + self.scale**2 * information(embedding)
        rebuilt = Objective(total, target, self.scale, self.constant)
        rebuilt._inputs = self._inputs
        return rebuilt

    def error(self, embedding: Embedding) -> float:
        """Estimate the relative error of ``value``, given that exactly the images of ``embedding`` are in M.

        With R = M^-1 + D, the error of tr(R F) is tr(D F) = tr(F M^-1 (M R - I)), estimated by random vectors w as the
        mean of ``(R F w)^T (M R - I) w`` (Hutchinson 1990): a few products with matrices, where inverting M again would
        cost as much as many picks.
        """
        assert self._inputs is not None
        self._gather()
        start, target = self._inputs
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(len(start), ERROR_VECTORS, generator=generator, dtype=torch.float64).to(start.device)
        right = self.inverse @ vectors
        left = self.inverse @ (target @ vectors)
        v_left, v_right = product(embedding, torch.cat([left, right], dim=1)).split(ERROR_VECTORS, dim=1)
        residuals = (left * (start @ right - vectors)).sum(0) + self.scale**2 * (v_left * v_right).sum((0, 2))
        return float(residuals.abs().max()) / max(abs(self.value), 1e-300)

    def consider(self, embedding: Embedding, sign: float = 1.0) -> Update:
        """What adding the one image of ``embedding`` to M (or taking it out, ``sign`` -1) would change."""
        # (M + V^T V)^-1 = R - U (I + V U)^-1 U^T and (M - V^T V)^-1 = R - U (V U - I)^-1 U^T: one formula, two signs.
        v = dense(embedding.to(torch.float64))[0].mT * self.scale
        u, t = self.inverse @ v, self.sandwich @ v
        if self._count:
            past_u, past_ug, past_y = self._terms[:, : self._count]
            u_v, ug_v, y_v = past_u @ v, past_ug @ v, past_y @ v
            u -= past_ug.mT @ u_v
            t -= past_y.mT @ ug_v + past_ug.mT @ y_v
        inner = torch.linalg.inv(sign * torch.eye(v.shape[1], dtype=v.dtype, device=v.device) + v.mT @ u)
        middle = v.mT @ t
        return Update(torch.cat([u, t], dim=1) * self.scale, inner, middle, float((inner * middle).sum()))

    def apply(self, update: Update) -> None:
        """Change M as was considered."""
        u, t = (update.basis / self.scale).chunk(2, dim=1)
        ug = u @ update.inner
        self.value -= update.gain
        rows = u.shape[1]
        if not self._terms.shape[1]:
            self._terms = u.new_empty(3, LAZY_PICKS * rows, len(u))
        new = self._terms[:, self._count : self._count + rows]
        new[0], new[1], new[2] = u.mT, ug.mT, (t - 0.5 * ug @ update.middle).mT
        self._count += rows
        if self._count == self._terms.shape[1]:
            self._gather()

    def _gather(self) -> None:
        if self._count:
            u, ug, y = self._terms[:, : self._count]
            self.inverse.addmm_(ug.mT, u, alpha=-1)
            self.sandwich.addmm_(torch.cat([y, ug]).mT, torch.cat([ug, y]), alpha=-1)
            self._count = 0


@dataclass(frozen=True)
class TraceScorer:
    """Scores candidates by the fall of ``tr(M^-1 F)``: what shards need of an ``Objective``."""

    inverse: Tensor
    sandwich: Tensor

    def initial_state(self, embedding: Embedding, first: int) -> Tensor:
        """State of the images of ``embedding``, the pool's from position ``first``."""
        return initial_scores(embedding, self.inverse, self.sandwich)

    def update_state(self, state: Tensor, embedding: Embedding, update: Update, step: int) -> None:
        """Bring the state up to date with a pick, in place."""
        update_scores(state, embedding, update)

    def gains(self, state: Tensor, step: int, first: int) -> Tensor:
        """What each image would add, [n]; ``step`` counts the picks."""
        return gains(state)


def initial_scores(embedding: Embedding, inverse: Tensor, sandwich: Tensor) -> Tensor:
    """P and Q from ``Objective.matrices()``, of the embedding's type, stacked: [2, r, r, n]."""
    return torch.stack([quadratic(embedding, inverse), quadratic(embedding, sandwich)])


def update_scores(scores: Tensor, embedding: Embedding, update: Update) -> None:
    """Bring P and Q [2, r, r, n] up to date with a pick, in place.

    ``P -= x a^T`` and ``Q -= y x^T + x y^T``, with a = V U, b = V T, x = a G, y = b - x s / 2. Only the symmetric part
    of Q counts (P is symmetric, so ``tr((I + P)^-1 Q)`` does not see the rest): ``Q -= 2 y x^T`` does as well. Both
    are written out as sums of outer products along the rows, so that the images stay the contiguous axis.
    """
    rows = scores.shape[1]
    both = product(embedding, update.basis)
    a, b = both[:, :rows], both[:, rows:]
    x = update.inner @ a
    twice_y = b.baddbmm_(-update.middle.expand(rows, -1, -1), x, beta=2)
    left, right = torch.stack([x, twice_y]), torch.stack([a, x])
    for j in range(rows):
        scores.addcmul_(left[:, :, None, j], right[:, None, :, j], value=-1)


def gains(scores: Tensor) -> Tensor:
    """By how much each image would lower ``tr(M^-1 F)``: ``tr((I + P)^-1 Q)``, [n], from P and Q [2, r, r, n].

    Symmetric elimination of I + P, carried out on both sides of Q, for all images at once: when pivot k is reached,
    ``Q_kk / pivot`` is its share of the trace. LAPACK on n small systems takes longer.
    """
    rows = scores.shape[1]
    p, q = scores.clone()
    p.diagonal().add_(1.0)
    total = torch.zeros_like(p[0, 0])
    for k in range(rows):
        pivot, corner = p[k, k], q[k, k]
        total.addcdiv_(corner, pivot)
        if k + 1 < rows:
            factor = p[k + 1 :, k] / pivot
            twice_y = (q[k + 1 :, k] + q[k, k + 1 :]).addcmul_(factor, corner, value=-1)
            p[k + 1 :, k + 1 :].addcmul_(factor[:, None], p[None, k, k + 1 :], value=-1)
            q[k + 1 :, k + 1 :].addcmul_(twice_y[:, None], factor[None], value=-1)
    return total

"""The objective ``tr(M^-1 F)`` of BAIT (Ash et al. 2021), and its exact update for each pick.

The coordinator holds ``R = M^-1`` and ``H = R F R`` in an ``Objective``. A shard holds the scores of its images,
``P = V R V^T`` and ``Q = V H V^T``, [r, r] each. A pick changes all of them by terms of rank r or 2 r (Woodbury), so it
costs one structured product of the pool with 2 r columns, and no k x k product per image. See section 5
of docs/method.md.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fishermask.tensors.embedding import Embedding, dense, information, product, quadratic

LAZY_PICKS = 16
"""Number of picks whose terms are applied to R and H together. A larger number costs more work on pending terms
in each pick, and a smaller number costs more reads and writes of the matrices."""
ERROR_VECTORS = 4
"""Number of random vectors in ``Objective.error``."""


class Update(NamedTuple):
    """The change that one pick makes to the objective and to all scores."""

    basis: Tensor
    """[k - E, 2 r]: U = R V^T and Z = H V^T of the pick, times the scale of candidates."""
    inner: Tensor
    """G = (I + V U)^-1, [r, r]."""
    middle: Tensor
    """K = V Z, [r, r]."""
    gain: float
    """Decrease of the objective."""


class Objective:
    """``tr(M^-1 F)`` with the matrices R and H, in float64.

    A pick changes R and H by terms of rank r and 2 r. The terms of ``LAZY_PICKS`` picks are applied together, in one
    large product that reads and writes each matrix once.

    Args:
        start: M before any pick, symmetric positive definite, [k - E, k - E].
        target: F, [k - E, k - E].
        scale: factor of the embedding of every candidate: sqrt(w / (n_L + b)).
        constant: number that is added to the trace.
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
        # R = inverse - sum ug u^T and H = sandwich - sum (d ug^T + ug d^T), with ug = U G and d = Z - ug K / 2. The
        # pending terms are stored transposed: u, ug and d, [3, LAZY_PICKS * r, k - E], with r rows for each pick.
        self._terms = self.inverse.new_empty(3, 0, len(self.inverse))
        self._count = 0

    def matrices(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Return copies of scale^2 R and scale^2 H in ``dtype``, for products with unscaled embeddings."""
        self._apply_pending()
        return self.inverse.to(dtype) * self.scale**2, self.sandwich.to(dtype) * self.scale**2

    def add(self, embedding: Embedding) -> Update:
        """Add the one image of ``embedding`` to M and return the update of all scores."""
        update = self.consider(embedding)
        self.apply(update)
        return update

    def remove(self, embedding: Embedding) -> Update:
        """Remove the one image of ``embedding`` from M and return the update of all scores."""
        update = self.consider(embedding, -1.0)
        self.apply(update)
        return update

    def rebuild(self, embedding: Embedding) -> "Objective":
        """Return the objective with the images of ``embedding`` added to ``start``, computed without updates.

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
        """Estimate the relative error of ``value``, where M is ``start`` plus the images of ``embedding``.

        The error of tr(R F) is tr((R - M^-1) F) = tr(F M^-1 (M R - I)). For a random normal vector eps, the mean of
        ``(R F eps)^T (M R - I) eps`` is about this trace (Hutchinson 1990). The estimate is its largest absolute value
        over a few vectors. It takes a few products with matrices; inverting M would cost as much as many picks.
        """
        assert self._inputs is not None
        self._apply_pending()
        start, target = self._inputs
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(len(start), ERROR_VECTORS, generator=generator, dtype=torch.float64).to(start.device)
        r_eps = self.inverse @ vectors
        r_f_eps = self.inverse @ (target @ vectors)
        v_r_f_eps, v_r_eps = product(embedding, torch.cat([r_f_eps, r_eps], dim=1)).split(ERROR_VECTORS, dim=1)
        estimates = (r_f_eps * (start @ r_eps - vectors)).sum(0) + self.scale**2 * (v_r_f_eps * v_r_eps).sum((0, 2))
        return float(estimates.abs().max()) / max(abs(self.value), 1e-300)

    def consider(self, embedding: Embedding, sign: float = 1.0) -> Update:
        """Return the update for adding the one image of ``embedding`` to M, or for removing it if ``sign`` is -1."""
        # (M + V^T V)^-1 = R - U (I + V U)^-1 U^T and (M - V^T V)^-1 = R - U (V U - I)^-1 U^T.
        v = dense(embedding.to(torch.float64))[0].mT * self.scale
        u, z = self.inverse @ v, self.sandwich @ v
        if self._count:
            pending_u, pending_ug, pending_d = self._terms[:, : self._count]
            u_v, ug_v, d_v = pending_u @ v, pending_ug @ v, pending_d @ v
            u -= pending_ug.mT @ u_v
            z -= pending_d.mT @ ug_v + pending_ug.mT @ d_v
        inner = torch.linalg.inv(sign * torch.eye(v.shape[1], dtype=v.dtype, device=v.device) + v.mT @ u)
        middle = v.mT @ z
        return Update(torch.cat([u, z], dim=1) * self.scale, inner, middle, float((inner * middle).sum()))

    def apply(self, update: Update) -> None:
        """Apply an update that ``consider`` returned."""
        u, z = (update.basis / self.scale).chunk(2, dim=1)
        ug = u @ update.inner
        self.value -= update.gain
        rows = u.shape[1]
        if not self._terms.shape[1]:
            self._terms = u.new_empty(3, LAZY_PICKS * rows, len(u))
        new = self._terms[:, self._count : self._count + rows]
        new[0], new[1], new[2] = u.mT, ug.mT, (z - 0.5 * ug @ update.middle).mT
        self._count += rows
        if self._count == self._terms.shape[1]:
            self._apply_pending()

    def _apply_pending(self) -> None:
        if self._count:
            u, ug, d = self._terms[:, : self._count]
            self.inverse.addmm_(ug.mT, u, alpha=-1)
            self.sandwich.addmm_(torch.cat([d, ug]).mT, torch.cat([ug, d]), alpha=-1)
            self._count = 0


@dataclass(frozen=True)
class TraceScorer:
    """Scorer of the trace objective: P and Q of each image; see ``pool.shard.Scorer``."""

    inverse: Tensor
    """R times the squared scale of candidates, in the type of the scores."""
    sandwich: Tensor
    """H times the squared scale of candidates, in the type of the scores."""

    def initial_state(self, embedding: Embedding, first_position: int) -> Tensor:
        """Return P and Q of the images of ``embedding``, [2, r, r, n]."""
        return initial_scores(embedding, self.inverse, self.sandwich)

    def update_state(self, state: Tensor, embedding: Embedding, update: Update, step: int) -> None:
        """Update P and Q in place for a pick."""
        update_scores(state, embedding, update)

    def gains(self, state: Tensor, step: int, first_position: int) -> Tensor:
        """Return the gain of each image, [n]."""
        return gains(state)


def initial_scores(embedding: Embedding, inverse: Tensor, sandwich: Tensor) -> Tensor:
    """Return P and Q, [2, r, r, n], from ``Objective.matrices()`` in the type of the embedding."""
    return torch.stack([quadratic(embedding, inverse), quadratic(embedding, sandwich)])


def update_scores(scores: Tensor, embedding: Embedding, update: Update) -> None:
    """Update P and Q [2, r, r, n] in place for a pick.

    With Y = V U and W = V Z, ``P -= Y G Y^T`` and ``Q -= 2 (W - Y G K / 2) (Y G)^T``. Only the symmetric part of
    Q is exact, and only this part affects the gain ``tr((I + P)^-1 Q)``, because P is symmetric. Both updates are sums
    of outer products of columns, so that the images stay the contiguous axis.
    """
    rows = scores.shape[1]
    products = product(embedding, update.basis)
    y, w = products[:, :rows], products[:, rows:]
    yg = update.inner @ y
    doubled_w = w.baddbmm_(-update.middle.expand(rows, -1, -1), yg, beta=2)  # 2 W - Y G K
    first_factors, second_factors = torch.stack([yg, doubled_w]), torch.stack([y, yg])
    for c in range(rows):
        scores.addcmul_(first_factors[:, :, None, c], second_factors[:, None, :, c], value=-1)


def gains(scores: Tensor) -> Tensor:
    """Return the gain ``tr((I + P)^-1 Q)`` of each image, [n], from P and Q [2, r, r, n].

    The computation is a symmetric elimination of I + P, applied to both sides of Q, for all images at once. Each pivot
    adds the diagonal entry of Q divided by the pivot. LAPACK would take longer for n small systems.
    """
    rows = scores.shape[1]
    p, q = scores.clone()
    p.diagonal().add_(1.0)
    total = torch.zeros_like(p[0, 0])
    for i in range(rows):
        pivot, corner = p[i, i], q[i, i]
        total.addcdiv_(corner, pivot)
        if i + 1 < rows:
            factor = p[i + 1 :, i] / pivot
            change = (q[i + 1 :, i] + q[i, i + 1 :]).addcmul_(factor, corner, value=-1)
            p[i + 1 :, i + 1 :].addcmul_(factor[:, None], p[None, i, i + 1 :], value=-1)
            q[i + 1 :, i + 1 :].addcmul_(change[:, None], factor[None], value=-1)
    return total

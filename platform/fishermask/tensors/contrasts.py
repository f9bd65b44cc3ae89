"""What distinguishes the classes: C - 1 rows that carry all the Fisher information of a softmax over C.

With J = d z / d theta the gradients of an image's logits, its Fisher information is ``J^T (diag(p) - p p^T) J``. The
matrix between has rank C - 1, and its Cholesky factor is known (Tanabe, Sagae 1992, J. R. Stat. Soc. B 54): row r of
``A`` sets class r against the classes after it,

    A_r = sqrt(p_r q_(r+1) / q_r) (e_r - sum_(i>r) p_i / q_(r+1) e_i),    q_r = p_r + p_(r+1) + ...

so that ``A^T A = diag(p) - p p^T``. It is applied class by class, never formed: the mean over the classes after r needs
one step from that over the classes after r + 1.

Without the weights sqrt(p_c) (``none``, as the paper's released code has it) the matrix is ``A = I - 1 p^T``, C rows.
"""

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["sqrt", "none"]


def count(classes: int, weighting: Weighting) -> int:
    """Rows of A for so many classes."""
    return classes - 1 if weighting == "sqrt" else classes


def apply(p: Tensor, by_class: Tensor, weighting: Weighting) -> Tensor:
    """``A @ by_class``, [R, m, n], from p [C, n] and ``by_class`` [C, m, n], whose memory it takes."""
    if weighting == "none":
        return by_class.sub_((p[:, None] * by_class).sum(0))
    share, scale = _chain(p)
    mean = by_class[-1]
    for r in range(len(share) - 1, -1, -1):
        by_class[r] -= mean
        if r:
            mean.addcmul_(share[r], by_class[r])
    return by_class[:-1].mul_(scale[:, None])


def apply_transposed(p: Tensor, rows: Tensor, weighting: Weighting) -> Tensor:
    """``A^T @ rows``, [C, m, n], from p [C, n] and ``rows`` [R, m, n]."""
    if weighting == "none":
        return rows - p[:, None] * rows.sum(0)
    share, scale = _chain(p)
    found = rows.new_empty(len(p), *rows.shape[1:])
    torch.mul(rows, scale[:, None], out=found[:-1])
    before = torch.zeros_like(found[0])  # what all rows so far take from a class, by its share of those after them
    for r in range(len(share)):
        own = found[r].clone()
        taken = share[r] * before
        found[r] -= taken
        before += own - taken
    found[-1] = -before
    return found


def dense(p: Tensor, weighting: Weighting) -> Tensor:
    """A itself, [R, C, n]."""
    each = torch.eye(len(p), dtype=p.dtype, device=p.device)[:, :, None]
    return apply(p, each.repeat(1, 1, p.shape[1]), weighting)


def _chain(p: Tensor) -> tuple[Tensor, Tensor]:
    """``p_r / q_r`` and ``sqrt(p_r q_(r+1) / q_r)``, [C - 1, n]; zero where nothing is left."""
    left = p.flip(0).cumsum(0).flip(0)
    share = p[:-1] / left[:-1].clamp_min(torch.finfo(p.dtype).tiny)
    return share, (share * left[1:]).sqrt()

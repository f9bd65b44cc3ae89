"""Contrasts between classes: C - 1 rows that carry all Fisher information of a softmax over C classes.

The Fisher information of an image is ``J^T (diag(p) - p p^T) J``, where J = dz / d theta holds the gradients of its
logits z. The matrix in the middle has rank C - 1, and its Cholesky factor is known in closed form (Tanabe, Sagae 1992,
J. R. Stat. Soc. B 54): ``diag(p) - p p^T = A^T A``, where row c of A contrasts class c with the classes after it:

    A_cc = sqrt(p_c tail_(c+1) / tail_c),    where tail_c = p_c + p_(c+1) + ... + p_C
    A_co = -A_cc p_o / tail_(c+1)  for o > c,    and A_co = 0 for o < c

``apply`` forms no matrix A. It goes from the last class to the first, because the weighted mean over the classes after
c follows in one step from the mean over the classes after c + 1.

With the weighting ``none``, all classes have the same weight, as in the paper's released code: ``A = I - 1 p^T``, with
C rows.
"""

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["sqrt", "none"]


def num_rows(num_classes: int, weighting: Weighting) -> int:
    """Return r, the number of rows of A."""
    return num_classes - 1 if weighting == "sqrt" else num_classes


def apply(p: Tensor, by_class: Tensor, weighting: Weighting) -> Tensor:
    """Return ``A @ by_class``, [r, m, n], from p [C, n] and ``by_class`` [C, m, n]; overwrite ``by_class``."""
    if weighting == "none":
        return by_class.sub_((p[:, None] * by_class).sum(0))
    share, scale = _share_and_scale(p)
    mean = by_class[-1]
    for c in range(len(share) - 1, -1, -1):
        by_class[c] -= mean
        if c:
            mean.addcmul_(share[c], by_class[c])
    return by_class[:-1].mul_(scale[:, None])


def apply_transposed(p: Tensor, rows: Tensor, weighting: Weighting) -> Tensor:
    """Return ``A^T @ rows``, [C, m, n], from p [C, n] and ``rows`` [r, m, n]."""
    if weighting == "none":
        return rows - p[:, None] * rows.sum(0)
    share, scale = _share_and_scale(p)
    result = rows.new_empty(len(p), *rows.shape[1:])
    torch.mul(rows, scale[:, None], out=result[:-1])
    # ``pending`` sums what the rows so far subtract from the classes after them; each class takes its share.
    pending = torch.zeros_like(result[0])
    for c in range(len(share)):
        scaled_row = result[c].clone()
        subtracted = share[c] * pending
        result[c] -= subtracted
        pending += scaled_row - subtracted
    result[-1] = -pending
    return result


def dense(p: Tensor, weighting: Weighting) -> Tensor:
    """Return A itself, [r, C, n]."""
    identity = torch.eye(len(p), dtype=p.dtype, device=p.device)[:, :, None]
    return apply(p, identity.repeat(1, 1, p.shape[1]), weighting)


def _share_and_scale(p: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``p_c / tail_c`` and ``sqrt(p_c tail_(c+1) / tail_c)``, [C - 1, n]; zero where ``tail_c`` is zero."""
    tail = p.flip(0).cumsum(0).flip(0)
    share = p[:-1] / tail[:-1].clamp_min(torch.finfo(p.dtype).tiny)
    return share, (share * tail[1:]).sqrt()

"""C - 1 rows that carry the Fisher information of a softmax over C classes."""

import math

import pytest
import torch

from fishermask.tensors import contrasts

PEAKED = [[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


def probabilities(classes, n=50, spread=3.0):
    logits = spread * torch.randn(classes, n, generator=torch.Generator().manual_seed(classes), dtype=torch.float64)
    return logits.softmax(0)


@pytest.mark.parametrize(
    "p", [torch.tensor(PEAKED, dtype=torch.float64).mT, *map(probabilities, (2, 3, 10, 40))], ids=len
)
def test_contrasts_are_a_factor_of_the_covariance_of_a_softmax(p):
    actual = contrasts.dense(p, "sqrt")
    assert len(actual) == contrasts.num_rows(len(p), "sqrt") == len(p) - 1
    expected = torch.diag_embed(p.mT) - p.mT[:, :, None] * p.mT[:, None, :]
    torch.testing.assert_close(torch.einsum("ron,rpn->nop", actual, actual), expected, rtol=1e-12, atol=1e-15)


def test_unweighted_contrasts_have_a_row_for_each_class():
    p = probabilities(4)
    expected = torch.eye(4, dtype=p.dtype)[:, :, None] - p
    torch.testing.assert_close(contrasts.dense(p, "none"), expected)


@pytest.mark.parametrize("weighting", ["sqrt", "none"])
def test_apply_equals_the_product_with_dense_contrasts(weighting):
    p, generator = probabilities(5), torch.Generator().manual_seed(0)
    full = contrasts.dense(p, weighting)
    by_class = torch.randn(5, 7, 50, generator=generator, dtype=p.dtype)
    rows = torch.randn(len(full), 7, 50, generator=generator, dtype=p.dtype)
    torch.testing.assert_close(
        contrasts.apply(p, by_class.clone(), weighting), torch.einsum("ron,omn->rmn", full, by_class)
    )
    torch.testing.assert_close(contrasts.apply_transposed(p, rows, weighting), torch.einsum("ron,rmn->omn", full, rows))


def test_nearly_certain_predictions_lose_no_digits():
    """In float32, 1 - p is zero here, but the information p (1 - p) between the last two classes is not."""
    p = torch.tensor([[1e-30], [1e-12], [1.0], [1e-9]])
    actual = contrasts.dense(p, "sqrt")
    assert actual[2, 2, 0].item() == pytest.approx(math.sqrt(1e-9), rel=1e-6)
    assert actual[1, 1, 0].item() == pytest.approx(math.sqrt(1e-12), rel=1e-6)
    assert actual[0, 0, 0].item() == pytest.approx(math.sqrt(1e-30), rel=1e-6)
    assert actual.isfinite().all()

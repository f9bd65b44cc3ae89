"""Metrics and image statistics, compared with values computed by hand."""

import math

import pytest
import torch

from fishermask.learning.metrics import evaluate
from fishermask.tensors.images import channel_statistics, normalize


def test_metrics_ignore_classes_without_test_images():
    """Classes 0, 1 and 3 have 4, 2 and 2 images; class 2 has none but is predicted once."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 3, 3])
    predictions = torch.tensor([0, 0, 0, 1, 1, 2, 0, 0])
    metrics = evaluate(predictions, labels, 4)
    assert metrics.accuracy == pytest.approx(4 / 8)
    assert metrics.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    # F1 of class 0: 3 hits of 4 true and 5 predicted; of class 1: 1 of 2 and 2; class 3 is never predicted.
    assert metrics.macro_f1 == pytest.approx((6 / 9 + 2 / 4 + 0) / 3)
    assert metrics.recall[:2] == [3 / 4, 1 / 2]
    assert math.isnan(metrics.recall[2])
    assert metrics.recall[3] == 0


def test_constant_channel_is_normalized_to_zero():
    images = torch.full((5, 2, 4, 4), 9, dtype=torch.uint8)
    images[:, 1, ::2] = 11
    statistics = channel_statistics(images)
    assert statistics.mean == pytest.approx((9 / 255, 10 / 255))
    assert statistics.std == pytest.approx((1 / 255, 1 / 255))  # one gray level stands in for a deviation of zero
    normal = normalize(images, statistics, torch.float64)
    torch.testing.assert_close(normal[:, 0], torch.zeros(5, 4, 4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert sorted(normal[:, 1].unique().tolist()) == pytest.approx([-1, 1])

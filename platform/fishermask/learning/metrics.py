"""How good a classifier is on the test set, with numbers that a rare class can move."""

from typing import NamedTuple

import torch
from torch import Tensor


class Metrics(NamedTuple):
    """All between 0 and 1."""

    accuracy: float
    balanced_accuracy: float
    """Mean recall of the classes that the test set holds."""
    macro_f1: float
    """Mean F1 of the same classes; a class that is never predicted counts 0."""
    recall: list[float]
    """By class; NaN for a class that the test set does not hold."""


def confusion(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[C, C] counts: row true class, column predicted class."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, -1)


def evaluate(predictions: Tensor, labels: Tensor, num_classes: int) -> Metrics:
    """Metrics of ``predictions`` [n] against ``labels`` [n]."""
    counts = confusion(predictions, labels, num_classes).double()
    hits, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    present = true > 0
    recall = hits / true
    # 2 hits / (true + predicted) is F1 without the division by zero of its usual form.
    f1 = 2 * hits / (true + predicted)
    return Metrics(
        float(hits.sum() / true.sum()),
        float(recall[present].mean()),
        float(f1[present].mean()),
        recall.tolist(),
    )

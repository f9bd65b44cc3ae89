"""Classification metrics. Balanced accuracy and macro F1 weight all classes equally, whatever their sizes."""

from typing import NamedTuple

import torch
from torch import Tensor


class Metrics(NamedTuple):
    """Metrics between 0 and 1."""

    accuracy: float
    balanced_accuracy: float
    """Mean recall of the classes in the test set."""
    macro_f1: float
    """Mean F1 score of the classes in the test set; 0 for a class that is never predicted."""
    recall: list[float]
    """Recall of each class; NaN for a class that is not in the test set."""


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return counts [C, C]: rows are true classes, columns are predicted classes."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, -1)


def evaluate(predictions: Tensor, labels: Tensor, num_classes: int) -> Metrics:
    """Return the metrics of ``predictions`` [n] for ``labels`` [n]."""
    counts = confusion_matrix(predictions, labels, num_classes).double()
    hits, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    present = true > 0
    recall = hits / true
    # Equal to the usual form of F1, without its division by zero.
    f1 = 2 * hits / (true + predicted)
    return Metrics(
        float(hits.sum() / true.sum()),
        float(recall[present].mean()),
        float(f1[present].mean()),
        recall.tolist(),
    )

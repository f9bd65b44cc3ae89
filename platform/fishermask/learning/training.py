"""Train a classifier on the labeled images up to a target accuracy, and predict with it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishermask.tensors.images import Images, Statistics, crop_and_flip, normalize

PREDICTION_BATCH = 256


class TrainingReport(NamedTuple):
    """Outcome of training."""

    epochs: int
    accuracy: float
    """Training accuracy of the last epoch, counted during the epoch, on the augmented images if any."""
    ended_by: str
    """``target`` if ``target_accuracy`` was reached, ``cap`` after ``max_epochs``."""


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    statistics: Statistics,
    order: torch.Generator,
    *,
    learning_rate: float,
    batch_size: int,
    target_accuracy: float,
    max_epochs: int,
    clip: float | None,
    augmentation: torch.Generator | None,
    progress: Callable[[int, int], None] = lambda epoch, max_epochs: None,
) -> TrainingReport:
    """Train ``model`` in place with Adam and cross-entropy on uint8 ``images`` [n, ...] and ``labels`` [n].

    Args:
        order: random generator that shuffles the images of each epoch.
        clip: largest absolute value of a gradient's entries; None for no limit.
        augmentation: random generator of the random crops and flips; None for no augmentation.
        progress: called after each epoch with its number and ``max_epochs``.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    model.train()
    accuracy = 0.0
    for epoch in range(1, max_epochs + 1):
        correct = 0
        batches = _split_batches(torch.randperm(len(images), generator=order).to(images.device), batch_size)
        for batch in batches:
            inputs = images[batch]
            if augmentation is not None:
                inputs = crop_and_flip(inputs, augmentation)
            logits = model(normalize(inputs, statistics))
            loss = F.cross_entropy(logits, labels[batch])
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the training loss became {loss.item()} in epoch {epoch}; lower training.learning_rate"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_value_(model.parameters(), clip)
            optimizer.step()
            correct += int((logits.argmax(-1) == labels[batch]).sum())
        accuracy = correct / sum(map(len, batches))
        if accuracy >= target_accuracy:
            return TrainingReport(epoch, accuracy, "target")
        progress(epoch, max_epochs)
    return TrainingReport(max_epochs, accuracy, "cap")


def _split_batches(order: Tensor, size: int) -> list[Tensor]:
    """Return ``order`` [n] in batches of ``size``. No batch has one image, because batch norm cannot train on it.

    A single last image is added to the batch before it. If ``size`` or n is 1, each image is repeated in its batch.
    """
    batches = list(order.split(size))
    if len(batches) > 1 and len(batches[-1]) == 1 and size > 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return [batch if len(batch) > 1 else batch.repeat(2) for batch in batches]


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Images,
    statistics: Statistics,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Return the logits [n, C] of ``images`` in eval mode, without augmentation, on the model's device.

    Args:
        progress: called after each batch with the number of predicted images and n.
    """
    model.eval()
    device = next(model.parameters()).device
    logits = []
    for start in range(0, len(images), PREDICTION_BATCH):
        batch = images[start : start + PREDICTION_BATCH]
        logits.append(model(normalize(batch.to(device), statistics)))
        progress(start + len(batch), len(images))
    return torch.cat(logits)

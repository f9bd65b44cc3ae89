"""Training a classifier on the labeled images until it fits them, and predicting with it. Knows no active learning."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishermask.tensors.images import Images, Statistics, crop_and_flip, normalize

PREDICTION_BATCH = 256


class TrainingReport(NamedTuple):
    """How training went."""

    epochs: int
    accuracy: float
    """Of the last epoch, counted while it ran, so on augmented images where there is augmentation."""
    ended_by: str
    """``target`` when the accuracy asked for was reached, ``cap`` when the epochs ran out."""


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
) -> TrainingReport:
    """Train ``model`` in place with Adam and cross-entropy on uint8 ``images`` [n, ...] and ``labels`` [n].

    Args:
        order: shuffles the images of each epoch.
        clip: gradients are clamped to +- this.
        augmentation: random crop and flip from this generator; none when None.

    Raises:
        FloatingPointError: the loss is no longer a number.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    model.train()
    accuracy = 0.0
    for epoch in range(1, max_epochs + 1):
        correct = 0
        batches = _batches(torch.randperm(len(images), generator=order).to(images.device), batch_size)
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
    return TrainingReport(max_epochs, accuracy, "cap")


def _batches(order: Tensor, size: int) -> list[Tensor]:
    """``order`` [n] in batches of ``size``, none of them of a single image, of which batch norm has no statistics.

    A single image at the end joins the batch before it; where all batches are of one, each image comes twice.
    """
    batches = list(order.split(size))
    if len(batches) > 1 and len(batches[-1]) == 1 and size > 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return [batch if len(batch) > 1 else batch.repeat(2) for batch in batches]


@torch.no_grad()
def predict(model: nn.Module, images: Images, statistics: Statistics) -> Tensor:
    """Logits [n, C] of ``images`` in eval mode, without augmentation, where the model is."""
    model.eval()
    device = next(model.parameters()).device
    batches = (images[start : start + PREDICTION_BATCH] for start in range(0, len(images), PREDICTION_BATCH))
    return torch.cat([model(normalize(batch.to(device), statistics)) for batch in batches])

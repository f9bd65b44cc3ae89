"""What a query computes: all that its memory and time depend on, except for the size of the pool."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishermask.errors import InputError
from fishermask.tensors import contrasts
from fishermask.tensors.approximation import sample_size
from fishermask.tensors.contrasts import Weighting
from fishermask.tensors.gradient_plan import GradientPlan


@dataclass(frozen=True)
class Workload:
    """The computation of one query. Without a ``layout``, the query only predicts the pool."""

    num_classes: int
    layout: GradientPlan | None = None
    """How the model's parameters are differentiated, where images are embedded."""
    body_size: int = 0
    """Masked parameters outside the last layer."""
    top_classes: int = 0
    """Classes that an embedding keeps for each image."""
    width: int = 0
    """E, inputs of the last layer with its bias."""
    trace: bool = False
    """Whether candidates are scored by the trace objective, with k x k matrices; otherwise by distances."""
    fisher_samples: int = 0
    """Images whose Fisher information ranks the parameters first; 0 if none does."""
    oversample: float = 1.0
    """Picks, as a multiple of the batch."""
    weighting: Weighting = "sqrt"

    @property
    def rows(self) -> int:
        """Rows of an embedding."""
        return contrasts.num_rows(self.top_classes, self.weighting)

    @property
    def exact_rows(self) -> int:
        """Rows of an embedding with all classes."""
        return contrasts.num_rows(self.num_classes, self.weighting)

    @property
    def columns(self) -> int:
        """k - E, columns of an embedding."""
        return self.body_size + (self.num_classes - 1) * self.width

    @property
    def error_samples(self) -> int:
        """Images on which the error of keeping few classes is measured; 0 if all are kept."""
        return sample_size(self.exact_rows) if self.top_classes < self.num_classes else 0


def prediction_workload(model: nn.Module, images: Tensor) -> Workload:
    """Return the workload of a query that only predicts with ``model``, which takes ``images`` [n, ...]."""
    with torch.no_grad():
        return Workload(model(images).shape[1])


def embedding_workload(
    model: nn.Module,
    images: Tensor,
    layout: GradientPlan,
    body_size: int = 0,
    *,
    trace: bool = True,
    fisher_samples: int = 0,
    top_classes: int | None = None,
    oversample: float = 1.0,
    weighting: Weighting = "sqrt",
) -> Workload:
    """Return the workload of a query that embeds the pool with ``model``, which takes ``images`` [n, ...].

    Raises:
        InputError: ``top_classes`` would keep all classes.
    """
    num_classes = prediction_workload(model, images).num_classes
    if top_classes is not None and top_classes >= num_classes:
        raise InputError(f"top_classes: {top_classes} keeps all {num_classes} classes; lower it, or leave it out")
    head = None if layout.head is None else model.get_submodule(layout.head)
    assert head is None or isinstance(head, nn.Linear)
    width = 0 if head is None else head.in_features + (head.bias is not None)
    kept = top_classes or num_classes
    return Workload(num_classes, layout, body_size, kept, width, trace, fisher_samples, oversample, weighting)

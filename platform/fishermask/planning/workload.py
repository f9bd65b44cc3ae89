"""The workload of a query, and the costs of its operations in bytes and seconds, measured on a few images.

The peak memory of an operation is measured, because shapes do not determine it: activations, tensors that autograd
saves, and loops that ``torch.func`` unrolls add to it.
"""

import timeit
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fishermask.errors import InputError
from fishermask.pool.blocks import ALIGNMENT, DIAGONAL_BATCH
from fishermask.tensors import contrasts
from fishermask.tensors.contrasts import Weighting
from fishermask.tensors.embedding import embed
from fishermask.tensors.gradient_plan import GradientPlan, plan_gradients
from fishermask.tensors.mask import Mask, body_parameters, fisher_diagonal, head_size, random_mask
from fishermask.tensors.slow_gradients import copy_model

BATCH_BYTES = 2e9
"""Largest memory of a batch for the Fisher diagonal. It is constant, because rounding depends on the batch size."""


@dataclass(frozen=True)
class Workload:
    """Computations of a query: with a ``gradient_plan``, embeddings of the pool; otherwise, predictions of the pool."""

    gradient_plan: GradientPlan | None = None
    body_size: int = 0
    """Number of masked parameters outside the last layer."""
    trace: bool = True
    """Whether candidates are scored by the trace objective, with k x k matrices; otherwise by distances."""
    fisher_samples: int = 0
    """Number of images whose Fisher information ranks the parameters; 0 without a ranking."""
    top_classes: int | None = None
    """Number of classes of each image that its embedding represents; None for all classes."""
    oversample: float = 1.0
    """Number of picks divided by the size of the batch."""
    weighting: Weighting = "sqrt"
    fraction: float | None = None
    """Masked share of all parameters, if this setting determines the size of the mask; otherwise None."""
    uses_model: bool = True
    """Whether the query uses the model; if not, it computes nothing on the pool."""


class Cost(NamedTuple):
    """Cost of an operation on a batch of images, on one thread."""

    image_bytes: float = 0.0
    """Peak bytes for each image of the batch."""
    fixed_bytes: float = 0.0
    """Peak bytes that do not depend on the size of the batch, such as those of a sum of gradients."""
    image_seconds: float = 0.0
    """Seconds for each image of the batch."""


@dataclass(frozen=True)
class Measurement:
    """Sizes of a workload with a given model, and measured costs of its operations and of training."""

    work: Workload
    num_classes: int
    width: int
    """E, the number of inputs of the last layer, including its bias; 0 without a linear last layer."""
    num_body_parameters: int
    """Number of parameters outside the last layer that can be masked."""
    dtype: torch.dtype
    input_bytes: int
    """Bytes of one input of the model."""
    stored_bytes: int
    """Bytes of one image of the pool."""
    model_bytes: int
    verification_bytes: int = 0
    """Peak bytes while the gradients of the trained model are verified."""
    prediction: Cost = Cost()
    training: Cost = Cost()
    embedding: Cost = Cost()
    diagonal: Cost = Cost()
    """Cost of the Fisher diagonal."""

    @property
    def classes(self) -> int:
        """q, the number of classes of each image that its embedding represents."""
        return self.work.top_classes or self.num_classes

    @property
    def rows(self) -> int:
        """r, the number of rows of an embedding."""
        return contrasts.num_rows(self.classes, self.work.weighting)

    @property
    def columns(self) -> int:
        """k - E, the number of columns of an embedding."""
        return self.work.body_size + (self.num_classes - 1) * self.width

    @property
    def numbers(self) -> int:
        """Number of stored values of an embedding."""
        return self.rows * self.work.body_size + self.width + self.classes

    @property
    def diagonal_batch(self) -> int:
        """Number of images whose Fisher diagonal is computed at once."""
        return max(1, min(DIAGONAL_BATCH, int(BATCH_BYTES // max(self.diagonal.image_bytes, 1.0))))


def measure(
    model: nn.Module,
    images: Tensor,
    work: Workload | None,
    stored_bytes: int | None = None,
    training: bool = True,
    seconds: bool = True,
    verification_bytes: int | None = None,
) -> Measurement:
    """Measure a query with the workload ``work`` and ``model``; None stands for a query that does not use the model.

    Args:
        images: at least one input of the model, [n, ...].
        stored_bytes: bytes of one image of the pool; by default one byte for each number, as for uint8 images.
        training: whether to measure training.
        seconds: whether to measure seconds; they take longer to measure than bytes.
        verification_bytes: peak bytes of the verification of the gradients, if they are known.

    Raises:
        InputError: ``top_classes`` is not smaller than the number of classes.
    """
    work = work or Workload(uses_model=False)
    shard_model = copy_model(model).eval().requires_grad_(False)
    with torch.no_grad():
        prediction, num_classes = measure_cost(shard_model, images, seconds), shard_model(images).shape[1]
    if (work.top_classes or 0) >= num_classes:
        raise InputError(
            f"strategy.params.top_classes: {work.top_classes} is not smaller than the number of classes, "
            f"{num_classes}; lower it, or remove it"
        )
    width = num_body_parameters = 0
    embedding = diagonal = Cost()
    if (plan := work.gradient_plan) is not None:
        body = body_parameters(shard_model, plan)
        width = head_size(model, plan) // num_classes
        num_body_parameters = sum(parameter.numel() for parameter in body.values())
        if verification_bytes is None:
            verification_bytes = peak_bytes(lambda: plan_gradients(model, images))
        # A random mask is spread over all layers, and so takes the most memory.
        generator = torch.Generator().manual_seed(0)
        mask = random_mask(body, plan, work.body_size, generator) if work.body_size else Mask(plan, {})
        embedding = measure_cost(
            lambda batch: embed(shard_model, batch, mask, work.weighting, work.top_classes), images, seconds
        )
        if work.fisher_samples:
            diagonal = measure_cost(lambda batch: fisher_diagonal(shard_model, batch, plan), images, seconds)
    return Measurement(
        work,
        num_classes,
        width,
        num_body_parameters,
        images.dtype,
        input_bytes=images[0].nbytes,
        stored_bytes=images[0].numel() if stored_bytes is None else stored_bytes,
        model_bytes=sum(value.nbytes for value in [*model.parameters(), *model.buffers()]),
        verification_bytes=verification_bytes or 0,
        prediction=prediction,
        training=_training_cost(model, images, seconds) if training else Cost(),
        embedding=embedding,
        diagonal=diagonal,
    )


def _training_cost(model: nn.Module, images: Tensor, seconds: bool) -> Cost:
    """Measure a training step with Adam. The fixed bytes include the gradients and Adam's state."""
    network = copy_model(model).train()

    def train(batch: Tensor) -> None:
        optimizer = torch.optim.Adam(network.parameters())
        for _ in range(2):  # the first step creates Adam's state
            loss = F.cross_entropy(network(batch), batch.new_zeros(len(batch), dtype=torch.long))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with torch.random.fork_rng([]):
        cost = measure_cost(train, images, seconds)
    return cost._replace(image_seconds=cost.image_seconds / 2)


def measure_cost(operation: Callable[[Tensor], object], images: Tensor, seconds: bool = True) -> Cost:
    """Measure the bytes of ``operation``, and its ``seconds``, on batches that repeat the first of ``images``."""

    def batch(count: int) -> Tensor:
        return images[:1].expand(count, *images.shape[1:]).contiguous()

    operation(batch(2))  # the first call creates tensors that later calls reuse
    small, large = (peak_bytes(partial(operation, batch(count))) for count in (2, 6))
    image_bytes = (large - small) / 4
    cost = Cost(image_bytes, max(0.0, small - 2 * image_bytes))
    if not seconds:
        return cost
    inputs = batch(max(1, min(ALIGNMENT, int(BATCH_BYTES // max(image_bytes, 1.0)))))
    return cost._replace(image_seconds=shortest_seconds(partial(operation, inputs)) / len(inputs))


def shortest_seconds(operation: Callable[[], object]) -> float:
    """Return the shortest of three times of ``operation`` on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return min(timeit.repeat(operation, number=1, repeat=3))
    finally:
        torch.set_num_threads(threads)


def peak_bytes(operation: Callable[[], object]) -> int:
    """Return the peak memory in bytes of the tensors that ``operation`` creates."""
    with LiveBytes() as counter:
        operation()
    return counter.peak


class LiveBytes(TorchDispatchMode):
    """Context that counts the bytes of live tensors that were created in it."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if (key := storage._cdata) not in self.storages and key not in arguments:
                    self.storages.add(key)
                    self.current += storage.nbytes()
                    self.peak = max(self.peak, self.current)
                    weakref.finalize(storage, self._subtract, key, storage.nbytes())
        return result

    def _subtract(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.current -= size

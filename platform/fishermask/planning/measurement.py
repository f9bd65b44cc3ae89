"""What a model's training, predictions and gradients take: bytes and seconds, measured on a few images.

The peak of a computation does not follow from shapes (activations, what autograd saves, what ``torch.func`` unrolls),
so it is counted: every tensor that is alive while a few images are processed.
"""

import functools
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fishermask.planning.workload import Workload
from fishermask.pool.blocks import ALIGNMENT, DIAGONAL_BATCH
from fishermask.tensors.embedding import embed
from fishermask.tensors.gradient_plan import GradientPlan, plan_gradients
from fishermask.tensors.mask import Mask, body_parameters, fisher_diagonal, random_mask
from fishermask.tensors.slow_gradients import copy_model

DIAGONAL_BYTES = 2e9
"""The Fisher diagonal of as many images, at most, is computed at once as take this many bytes. A fixed number, not what
a machine has: the sum over a batch rounds with its size."""


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are created inside the block and are alive at once."""

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


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the bytes of the tensors that ``work`` creates, at the moment when most are alive."""
    counter = _LiveBytes()
    with counter:
        work()
    return counter.peak


def batch_bytes(work: Callable[[Tensor], object], images: Tensor) -> tuple[float, float]:
    """Return the bytes that ``work`` on a batch needs for each image of it, and those it needs whatever their number.

    The second is large where a result does not depend on the batch's size, as a sum of gradients does.
    """

    def batch(count: int) -> Tensor:
        return images[:1].expand(count, *images.shape[1:]).contiguous()

    work(batch(2))  # the first call creates what later calls share
    few, many = (peak_bytes(functools.partial(work, batch(count))) for count in (2, 6))
    per_image = (many - few) / 4
    return per_image, max(0.0, few - 2 * per_image)


def _seconds(work: Callable[[], object]) -> float:
    """Return the shortest of three times that ``work`` takes on one thread."""
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(3):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return min(times)


@dataclass(frozen=True)
class Measurement:
    """Bytes and seconds on one thread. ``*_bytes`` and ``*_seconds`` of images are for each image."""

    work: Workload | None
    """The query; None if it looks at no image."""
    base: torch.dtype
    image_numbers: int
    """Numbers of one image."""
    model_bytes: float
    """Parameters and buffers."""
    prediction_bytes: float
    prediction_seconds: float
    training_bytes: float = 0.0
    training_fixed_bytes: float = 0.0
    """Gradients, and the optimizer's state."""
    training_seconds: float = 0.0
    verification_bytes: float = 0.0
    """While the layout of the trained model is verified."""
    num_body_parameters: int = 0
    embed_bytes: float = 0.0
    embed_seconds: float = 0.0
    exact_bytes: float = 0.0
    """While an image is embedded with all classes."""
    exact_seconds: float = 0.0
    diagonal_batch: int = DIAGONAL_BATCH
    diagonal_bytes: float = 0.0
    """While the Fisher diagonal of a whole batch is computed."""
    diagonal_seconds: float = 0.0

    def with_body_size(self, body_size: int) -> "Measurement":
        """Return what this would be with a smaller mask; other bytes of a chunk are taken to stay the same."""
        assert self.work is not None
        fewer = (self.work.body_size - body_size) * self.work.rows * self.base.itemsize
        work = replace(self.work, body_size=body_size)
        return replace(self, work=work, embed_bytes=max(0.0, self.embed_bytes - fewer))


def measure(
    model: nn.Module, images: Tensor, work: Workload | None, mask: Mask | None = None, training: bool = False
) -> Measurement:
    """Measure the query ``work`` with ``model``.

    Args:
        images: normalized images [1, ...] or more, of the type and on the device that chunks will have.
        mask: as it was chosen; otherwise one spread over all layers, which needs the most.
        training: whether to measure training too.
    """
    several = images[:1].expand(ALIGNMENT, *images.shape[1:]).contiguous()
    frozen = copy_model(model).eval().requires_grad_(False)  # as shards hold it
    with torch.no_grad():
        prediction_bytes = batch_bytes(frozen, images)[0]
        prediction_seconds = _seconds(lambda: frozen(several)) / ALIGNMENT
    general: dict[str, Any] = {
        "work": work,
        "base": images.dtype,
        "image_numbers": images[0].numel(),
        "model_bytes": sum(value.numel() * value.element_size() for value in [*model.parameters(), *model.buffers()]),
        "prediction_bytes": prediction_bytes,
        "prediction_seconds": prediction_seconds,
        **(_training(model, several) if training else {}),
    }
    if work is None or work.layout is None:
        return Measurement(**general)
    layout = work.layout
    verification = verification_bytes(model, images, layout)
    body = body_parameters(frozen, layout)
    if mask is None:
        mask = random_mask(body, layout, work.body_size, torch.Generator().manual_seed(0))

    def embed_images(images: Tensor) -> object:
        return embed(frozen, images, mask, weighting=work.weighting, top_classes=work.top_classes)

    embed_bytes = batch_bytes(embed_images, images)[0]
    embed_seconds = _seconds(lambda: embed_images(several)) / ALIGNMENT
    per_image, fixed = diagonal_bytes(frozen, images, layout) if work.fisher_samples else (0.0, 0.0)
    diagonal_batch = max(1, min(DIAGONAL_BATCH, int(DIAGONAL_BYTES // max(per_image, 1.0))))
    few = several[: min(ALIGNMENT, diagonal_batch)]
    # With all classes: more rows, and as many more backward passes where there is a body. Trying it may take long.
    more = work.exact_rows - work.rows if work.body_size else 0
    return Measurement(
        **general,
        verification_bytes=verification,
        num_body_parameters=sum(p.numel() for p in body.values()) if work.body_size else 0,
        embed_bytes=embed_bytes,
        embed_seconds=embed_seconds,
        exact_bytes=embed_bytes + more * (work.body_size + 2 * work.num_classes) * images.element_size(),
        exact_seconds=embed_seconds * (1 + more / work.rows),
        diagonal_batch=diagonal_batch,
        diagonal_bytes=per_image * diagonal_batch + fixed,
        diagonal_seconds=(
            _seconds(lambda: fisher_diagonal(frozen, few, layout)) / len(few) if work.fisher_samples else 0.0
        ),
    )


def diagonal_bytes(model: nn.Module, images: Tensor, layout: GradientPlan) -> tuple[float, float]:
    """Return the bytes of a batch's Fisher diagonal: for each image, and whatever their number."""
    return batch_bytes(lambda batch: fisher_diagonal(model, batch, layout), images)


def verification_bytes(model: nn.Module, images: Tensor, layout: GradientPlan) -> float:
    """Return the bytes while the layout of a trained model is found and verified."""
    trained = copy_model(model)
    for name, parameter in trained.named_parameters():
        parameter.requires_grad_(name not in layout.frozen)
    return peak_bytes(lambda: plan_gradients(trained, images))


def _training(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Measure one step of training with Adam."""
    trained = copy_model(model).train()
    optimizer = torch.optim.Adam(trained.parameters())

    def step(images: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(trained(images), images.new_zeros(len(images), dtype=torch.long)).backward()
        optimizer.step()

    with torch.random.fork_rng([]):
        per_image, fixed = batch_bytes(step, images)
        seconds = _seconds(lambda: step(images)) / len(images)
    state = sum(
        value.numel() * value.element_size()
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    )
    return {"training_bytes": per_image, "training_fixed_bytes": fixed + state, "training_seconds": seconds}

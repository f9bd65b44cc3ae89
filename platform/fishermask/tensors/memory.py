"""How much memory a query needs, known before it starts: bytes an image, k x k matrices, the peak of a gradient chunk.

Sizes of what is kept follow from shapes. The peak of a gradient chunk does not (activations, what autograd saves, what
``torch.func`` unrolls), so it is counted: every tensor that lives while a few images are differentiated.
"""

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fishermask.errors import InputError
from fishermask.tensors import contrasts
from fishermask.tensors.approximation import sample_size
from fishermask.tensors.contrasts import Weighting
from fishermask.tensors.embedding import embed
from fishermask.tensors.layout import Layout, inspect
from fishermask.tensors.mask import Mask, body_parameters, fisher_diagonal, random_mask
from fishermask.tensors.slow_gradients import copy_model

CHUNKS = (128, 64, 32, 16)
"""Images differentiated at once. From 16 on, and in multiples of it, an image's numbers do not depend on the chunk."""
ALIGNMENT = CHUNKS[-1]
LIBRARIES, DISTANCE_LIBRARIES, PREDICTION_LIBRARIES = 40e6, 30e6, 5e6
"""Bytes that kernels and thread pools need of their own: for a query with k x k products, for one without, and for one
that only predicts ..."""
SLACK = 0.1
"""... and what the allocator cannot give back in time, as a share of all. Both as benchmarks/memory.py finds them."""
PREDICTED = 128
"""Images predicted at once: a fixed number, as numbers may round with it; of more, activations leave the cache."""
CHUNK_GAPS, GAPS, PREDICTION_GAPS = 1.2, 1.35, 1.75
"""How many times what is alive the heap of a thread holds while chunks are embedded; while batches are differentiated
by all parameters; while batches are predicted, which a kernel may copy into another layout. As benchmarks/memory.py
finds them."""
RANKING = 48
"""Bytes for each parameter while all are put in order."""
DIAGONAL_BATCH = 32
DIAGONAL_BYTES = 2e9
"""The Fisher diagonal of as many images, at most, is computed at once as take this many bytes. A fixed number, not what
a machine has: the sum over a batch rounds with its size."""


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors that come to life inside the block and are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if (key := storage._cdata) not in self.known and key not in given:
                    self.known.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def live_peak(work: Callable[[], object]) -> int:
    """Bytes of the tensors that ``work`` makes, at the moment when most are alive."""
    counter = _Live()
    with counter:
        work()
    return counter.peak


def _batch_bytes(work: Callable[[Tensor], object], images: Tensor) -> tuple[float, float]:
    """Return the bytes that ``work`` on a batch needs for each image of it, and those it needs whatever their number.

    The second is large where a result does not depend on the batch's size, as a sum of gradients does.
    """
    work(images[:1])  # what is made once, by the first call, is nobody's

    def peak(count: int) -> int:
        batch = images[:1].expand(count, *images.shape[1:]).contiguous()
        return live_peak(lambda: work(batch))

    few, many = peak(2), peak(6)
    each = (many - few) / 4
    return each, max(0.0, few - 2 * each)


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of three times that ``work`` takes on one thread."""
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(3):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return min(times)


def chunk_bytes(model: nn.Module, image: Tensor, mask: Mask, **options: Any) -> float:
    """Bytes for each image of a chunk while it is embedded under ``mask``; ``options`` are those of ``embed``."""
    return _batch_bytes(lambda images: embed(model, images, mask, **options), image)[0]


def diagonal_bytes(model: nn.Module, image: Tensor, layout: Layout) -> tuple[float, float]:
    """Bytes for each image of a batch while its Fisher diagonal is computed, and bytes whatever their number."""
    return _batch_bytes(lambda images: fisher_diagonal(model, images, layout), image)


def _verification_bytes(model: nn.Module, image: Tensor, layout: Layout) -> int:
    """Bytes while the layout of a trained model is found and verified."""
    trained = copy_model(model)
    for name, parameter in trained.named_parameters():
        parameter.requires_grad_(name not in layout.frozen)
    return live_peak(lambda: inspect(trained, image))


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(value.numel() * value.element_size() for value in [*model.parameters(), *model.buffers()])


@dataclass(frozen=True)
class Workload:
    """What a query computes: all that its memory and time depend on but the size of the pool."""

    layout: Layout
    body_size: int
    """k_body"""
    num_classes: int
    kept: int
    """q, classes kept of each image"""
    width: int
    """E"""
    trace: bool
    """Whether candidates are scored by the trace objective, with k x k matrices; else by distances."""
    ranked: int
    """Images whose Fisher information ranks the parameters first; 0 if none does."""
    oversample: float = 1.0
    """How many times the batch are picked."""
    weighting: Weighting = "sqrt"

    @property
    def rows(self) -> int:
        """R, rows of an embedding"""
        return contrasts.count(self.kept, self.weighting)

    @property
    def approximate(self) -> bool:
        """Whether only the most probable classes of an image are kept."""
        return self.kept < self.num_classes

    @property
    def exact_rows(self) -> int:
        """Rows of an embedding with all classes."""
        return contrasts.count(self.num_classes, self.weighting)

    @property
    def sampled(self) -> int:
        """Images on which the error of keeping few classes is measured."""
        return sample_size(self.exact_rows) if self.approximate else 0

    @property
    def size(self) -> int:
        """k - E, columns"""
        return self.body_size + (self.num_classes - 1) * self.width


def workload(
    model: nn.Module,
    images: Tensor,
    layout: Layout,
    body_size: int = 0,
    trace: bool = True,
    ranked: int = 0,
    top_classes: int | None = None,
    oversample: float = 1.0,
    weighting: Weighting = "sqrt",
) -> Workload:
    """The workload of a query with ``model``, which takes ``images`` [n, ...].

    Raises:
        InputError: ``top_classes`` would keep all.
    """
    with torch.no_grad():
        num_classes = model(images).shape[1]
    if top_classes is not None and top_classes >= num_classes:
        raise InputError(f"top_classes: {top_classes} keeps all {num_classes} classes; lower it, or leave it out")
    head = None if layout.head is None else model.get_submodule(layout.head)
    assert head is None or isinstance(head, nn.Linear)
    width = 0 if head is None else head.in_features + (head.bias is not None)
    kept = top_classes or num_classes
    return Workload(layout, body_size, num_classes, kept, width, trace, ranked, oversample, weighting)


@dataclass(frozen=True)
class Prediction:
    """What a query computes that looks at predictions only: one pass over the pool, without gradients."""

    num_classes: int


def prediction(model: nn.Module, images: Tensor) -> Prediction:
    """The workload of a query that only predicts with ``model``, which takes ``images`` [n, ...]."""
    with torch.no_grad():
        return Prediction(model(images).shape[1])


@dataclass(frozen=True)
class Estimate:
    """Bytes that a process needs for a query beyond what it holds before."""

    parts: Mapping[str, float]
    """What -> bytes, at the worst moment of the query."""
    moment: str
    """When that is."""
    chunk: int
    """Images differentiated at once."""

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {readable(size)}" for name, size in self.parts.items() if size >= 5e5)
        return f"{readable(self.total)} while it {self.moment} ({parts})"


def readable(size: float) -> str:
    """``1.23 GB``, or ``45 MB``."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{max(1, round(size / 1e6))} MB"


def image_bytes(work: Workload, storage: torch.dtype, scores: torch.dtype, base: torch.dtype) -> tuple[int, int]:
    """Bytes of an image's embedding and of its scores."""
    kept = (work.rows * work.body_size + work.width) * storage.itemsize + work.kept * base.itemsize
    if work.approximate:
        kept += 8 * work.kept
    return kept, (2 * work.rows**2 if work.trace else 1) * scores.itemsize


class Probe:
    """What a model's gradients take: bytes for each image of a chunk, and seconds on one thread.

    Args:
        image: normalised images [1, ...] or more, of the type and on the device that chunks will have.
        mask: as it was chosen; else one spread over all layers, which needs the most.
    """

    def __init__(self, model: nn.Module, image: Tensor, work: Workload, mask: Mask | None = None) -> None:
        self.verification = _verification_bytes(model, image, work.layout)
        model = copy_model(model).requires_grad_(False)  # as shards hold it
        if mask is None:
            body = body_parameters(model, work.layout)
            mask = random_mask(body, work.layout, work.body_size, torch.Generator().manual_seed(0))
        self.work, self.base, self.image_numbers = work, image.dtype, image[0].numel()
        self.model = model_bytes(model)
        self.parameters = sum(p.numel() for p in body_parameters(model, work.layout).values()) if work.body_size else 0
        options: dict[str, Any] = {"weighting": work.weighting, "top_classes": work.kept}
        self.chunk = chunk_bytes(model, image, mask, **options)
        several = image[:1].expand(ALIGNMENT, *image.shape[1:]).contiguous()
        self.embed_seconds = _seconds(lambda: embed(model, several, mask, **options)) / ALIGNMENT
        diagonal, fixed = diagonal_bytes(model, image, work.layout) if work.ranked else (0.0, 0.0)
        self.diagonal_batch = max(1, min(DIAGONAL_BATCH, int(DIAGONAL_BYTES // max(diagonal, 1.0))))
        self.diagonal = diagonal * self.diagonal_batch + fixed
        self.diagonal_seconds = 0.0
        if work.ranked:
            few = several[: min(ALIGNMENT, self.diagonal_batch)]
            self.diagonal_seconds = _seconds(lambda: fisher_diagonal(model, few, work.layout)) / len(few)
        # With all classes: more rows, and as many more backward passes where there is a body. Trying it may take long.
        more = work.exact_rows - work.rows if work.body_size else 0
        self.exact = self.chunk + more * (work.body_size + 2 * work.num_classes) * image.element_size()
        self.exact_seconds = self.embed_seconds * (1 + more / work.rows)


class PredictionProbe:
    """What a model's predictions take: bytes for each image of a block, and seconds on one thread.

    Args:
        image: a normalised image [1, ...], of the type that blocks will have.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, image: Tensor, work: Prediction) -> None:
        self.work, self.model = work, model_bytes(model)
        self.image = _batch_bytes(model, image)[0]
        self.image_numbers = image[0].numel()
        several = image[:1].expand(ALIGNMENT, *image.shape[1:]).contiguous()
        self.seconds = _seconds(lambda: model(several)) / ALIGNMENT
        self.row = work.num_classes * image.element_size()


def estimate_prediction(probe: PredictionProbe, images: int, size: int, block: int, shards: int = 1) -> Estimate:
    """What a process needs that predicts with ``shards`` shards of ``images`` pool images each.

    Args:
        size: images whose probabilities come to this process, 0 if it does not lead.
        block: images that are read at once.
    """
    together, numbers = min(PREDICTED, images), probe.image_numbers
    read = min(block, images) * numbers + together * numbers * probe.row // probe.work.num_classes
    parts = {
        "model": float(shards * probe.model),
        "images": float(shards * read),
        "activations": shards * PREDICTION_GAPS * together * probe.image,
        # Probabilities come in pieces, are put together, and those of the candidates taken out of them.
        "probabilities": 3.0 * size * probe.row,
    }
    return _with_libraries(parts, "predicts the pool", CHUNKS[0], PREDICTION_LIBRARIES)


def estimate(
    probe: Probe,
    images: int,
    block: int,
    part: int,
    chunk: int,
    storage: torch.dtype,
    scores: torch.dtype,
    shards: int = 1,
    leads: bool = True,
    picks: int = 0,
    labeled: int = 0,
) -> Estimate:
    """What a process needs that holds ``shards`` shards of ``images`` pool images each.

    Args:
        block: images that are read at once.
        part: images whose embeddings are kept together.
        chunk: images differentiated at once.
        leads: whether the process also leads the selection.
        picks: images that are chosen, more than the batch where some are taken back.
        labeled: images that are labeled already.
    """
    work, base = probe.work, probe.base.itemsize
    kept, scored = image_bytes(work, storage, scores, probe.base)
    numbers = work.rows * work.body_size + work.width + work.kept
    matrix = work.size**2 * 8 if work.trace else 0
    sums = 3 * matrix + 3 * 8 * work.body_size**2  # two sums and a part's share, with its body's as it grows
    block, part = min(block, images), min(part, images)
    together = min(chunk, part)
    # While a part is embedded: the block's images as bytes, a chunk as floats, its embeddings and those of the part.
    embedding = together * (CHUNK_GAPS * probe.chunk + base * probe.image_numbers) + (part + together) * base * numbers
    embedding += block * probe.image_numbers
    # While a part is scored: itself in the scores' type, and the largest structured products, or differences.
    products = part * (2 * (work.num_classes - 1) * work.width + 3 * work.rows * work.body_size)
    if not work.trace:
        products = part * (4 * work.kept + 3 * work.width)
    scoring = (products + (part * numbers if storage != scores else 0)) * scores.itemsize
    # While it is summed: itself in float64, its transposed contrasts, and one class's columns.
    summing = part * (numbers + work.kept * (work.body_size + 2 * work.kept) + (work.num_classes - 1) * work.width) * 8
    everything = shards * images * kept
    told = 2 * work.size**2 * scores.itemsize if work.trace else 0  # R and H as shards use them
    model, chosen = {"model": shards * probe.model}, (picks + (0 if work.trace else 3 * labeled)) * numbers * base
    batch = shards * (GAPS * probe.diagonal + probe.diagonal_batch * base * probe.image_numbers)
    selecting = {
        **model,
        "embeddings": everything + (chosen if leads else 0),
        "scores": shards * images * scored,
        "k x k matrices": told + ((4 if work.oversample > 1 else 2) * matrix if leads else 0),
    }
    moments: dict[str, dict[str, float]] = {
        # The sum so far and a batch's while the next is computed.
        "ranks the parameters": {
            **model,
            "gradients": batch,
            "parameters": 16 * probe.parameters if leads else 0,
            "images": 2 * work.ranked * probe.image_numbers if leads else 0,  # of each shard, then of all together
        },
        "embeds the pool": {**model, "embeddings": everything, "gradients": shards * embedding},
        "scores the pool": {**selecting, "products": shards * scoring},
    }
    if leads:
        # Mean, all of them in a row, sorted, their order, and what sorting takes; or a random order.
        sorting = RANKING if work.ranked else 16
        moments["orders the parameters"] = {**model, "parameters": sorting * probe.parameters}
        moments["verifies the gradients"] = {**model, "gradients": probe.verification}
    if leads and work.approximate:
        moments["measures the approximation"] = {**selecting, "products": _comparison(probe)}
    if work.trace:
        sums_here = {"k x k matrices": shards * sums, "products": shards * summing}
        moments["sums the information"] = {**model, "embeddings": everything, **sums_here}
        if leads:  # M, its factor, its inverse R, F, R F and H = R F R
            moments["inverts the information"] = {**model, "embeddings": everything, "k x k matrices": 6 * matrix}
            if work.oversample > 1:  # M and F are kept, and R and H, while the same are computed of the images left
                pruned = 8 * picks * (3 * numbers + work.kept * (work.body_size + 2 * work.kept))
                moments["prunes the batch"] = {**model, "k x k matrices": 10 * matrix, "products": pruned}
    worst = max(moments, key=lambda moment: sum(moments[moment].values()))
    return _with_libraries(moments[worst], worst, chunk, LIBRARIES if work.trace else DISTANCE_LIBRARIES)


def _comparison(probe: Probe) -> float:
    """Bytes while the error of keeping few classes is measured: exact embeddings, and matrices of rows by rows."""
    work, count = probe.work, probe.work.sampled
    numbers = work.exact_rows * work.body_size + work.width + work.num_classes
    pass_ = min(count, ALIGNMENT) * probe.exact + 2 * count * numbers * probe.base.itemsize
    products = 8 * count * (numbers + 2 * work.exact_rows * work.num_classes) + 6 * 8 * (count * work.exact_rows) ** 2
    return max(pass_, products)


def _with_libraries(parts: Mapping[str, float], moment: str, chunk: int, libraries: float) -> Estimate:
    return Estimate({**parts, "libraries": libraries + SLACK * sum(parts.values())}, moment, chunk)


def fit(probe: Probe, allowed: float, **settings: Any) -> Estimate:
    """The estimate with the largest chunk that needs no more than ``allowed`` bytes.

    Raises:
        InputError: not even the smallest does; the message says what takes the most and which setting would help.
    """
    estimates = [estimate(probe, chunk=chunk, **settings) for chunk in CHUNKS]
    for found in estimates:
        if found.total <= allowed:
            return found
    return checked(estimates[-1], allowed)


def checked(found: Estimate, allowed: float) -> Estimate:
    """``found``, if it is no more than ``allowed`` bytes.

    Raises:
        InputError: it is more; the message says what takes the most and which setting would help.
    """
    if found.total <= allowed:
        return found
    worst = max(found.parts.keys() - {"libraries"}, key=lambda part: found.parts[part])
    remedy = {
        "embeddings": "set engine.storage to bfloat16, lower strategy.params.fraction, or use shards on more machines",
        "scores": "lower strategy.params.top_classes, or use shards on more machines",
        "k x k matrices": "lower strategy.params.fraction, or resources.shards where they share a process",
    }.get(worst, "give it more, or choose a smaller model")
    raise InputError(
        f"resources.memory: a query needs {found}, which is more than the {readable(allowed)} there are; {remedy}"
    )

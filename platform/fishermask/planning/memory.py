"""The memory that a process of a run needs: what is kept follows from shapes, peaks are measured on a few images.

Factors are as ``benchmarks/memory.py`` finds them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fishermask.learning.training import PREDICTION_BATCH
from fishermask.planning.measurement import Measurement
from fishermask.planning.workload import Workload
from fishermask.pool.blocks import ALIGNMENT, BLOCK, PREDICTED, images_per_part
from fishermask.tensors.precision import Precision

TRACE_LIBRARIES, DISTANCE_LIBRARIES, PREDICTION_LIBRARIES = 40e6, 30e6, 5e6
"""Bytes that kernels and thread pools need: for a query with k x k products, for one without, for predictions alone."""
SLACK = 0.1
"""What the allocator cannot return in time, as a share of all."""
EMBEDDING_GAPS, DIAGONAL_GAPS, PREDICTION_GAPS, TRAINING_GAPS = 1.2, 1.35, 1.75, 2.2
"""How many times what is alive the heap of a thread holds while chunks are embedded; while batches are differentiated
by all parameters; while batches are predicted, which a kernel may copy into another memory format; in training."""
SORT_BYTES = 48
"""For each parameter while all are sorted."""


@dataclass(frozen=True)
class Task:
    """A query as a run or a user requests it."""

    pool_size: int
    query_size: int
    num_labeled: int = 0
    """Images labeled before the query, at most."""
    precision: Precision = Precision()
    training_batch: int = 0
    """Images of a training step; 0 if the process trains nothing."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that a process needs beyond what it holds before, at the worst moment."""

    parts: Mapping[str, float]
    """Component -> bytes."""
    stage: str
    """The worst moment: what the process does then."""

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in self.parts.items() if size >= 5e5)
        return f"{format_bytes(self.total)} ({parts})"


def format_bytes(size: float) -> str:
    """Return ``1.23 GB`` or ``45 MB``."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{max(1, round(size / 1e6))} MB"


def image_bytes(work: Workload, precision: Precision, base: torch.dtype) -> tuple[int, int]:
    """Return the bytes of an image's embedding and of its scores."""
    storage, scores = precision.storage or base, precision.scores or base
    embedding = (work.rows * work.body_size + work.width) * storage.itemsize + work.top_classes * base.itemsize
    if work.top_classes < work.num_classes:
        embedding += 8 * work.top_classes
    return embedding, (2 * work.rows**2 if work.trace else 1) * scores.itemsize


def estimate_memory(
    measured: Measurement, task: Task, chunk: int, images: int, shards: int = 1, coordinates: bool = True
) -> Estimate:
    """Estimate the memory of a process that holds ``shards`` shards of ``images`` pool images each.

    Args:
        chunk: images differentiated at once.
        coordinates: whether the process also trains, evaluates and leads the selection.
    """
    stages: dict[str, dict[str, float]] = {"idle": {}}
    if coordinates and task.training_batch:
        stages |= _training_stages(measured, task)
    if measured.work is not None and measured.work.layout is None:
        stages["predict"] = _prediction_parts(measured, task, images, shards, coordinates)
    elif measured.work is not None:
        stages |= _embedding_stages(measured, measured.work, task, chunk, images, shards, coordinates)
    for parts in stages.values():
        if parts:
            libraries = parts.pop("libraries", PREDICTION_LIBRARIES)
            parts["libraries"] = libraries + SLACK * sum(parts.values())
    stage = max(stages, key=lambda stage: sum(stages[stage].values()))
    return Estimate(stages[stage], stage)


def _training_stages(measured: Measurement, task: Task) -> dict[str, dict[str, float]]:
    """While the model is trained on the labeled images, and while the test set is predicted."""
    numbers, itemsize = measured.image_numbers, measured.base.itemsize
    batch = task.training_batch * (TRAINING_GAPS * measured.training_bytes + itemsize * numbers)
    evaluation = PREDICTION_BATCH * (PREDICTION_GAPS * measured.prediction_bytes + (1 + itemsize) * numbers)
    labeled = {"labeled images": float((task.num_labeled + task.query_size) * numbers)}
    model = {"model": measured.model_bytes}
    return {
        "train": {**model, **labeled, "gradients": measured.training_fixed_bytes, "activations": batch},
        "evaluate": {**model, "activations": evaluation},
    }


def _prediction_parts(
    measured: Measurement, task: Task, images: int, shards: int, coordinates: bool
) -> dict[str, float]:
    together, numbers = min(PREDICTED, images), measured.image_numbers
    assert measured.work is not None
    row = measured.work.num_classes * measured.base.itemsize
    read = min(BLOCK, images) * numbers + together * numbers * measured.base.itemsize
    return {
        "model": shards * measured.model_bytes,
        "images": float(shards * read),
        "activations": shards * PREDICTION_GAPS * together * measured.prediction_bytes,
        # Probabilities arrive in pieces, are concatenated, and those of the candidates are copied from them.
        "probabilities": 3.0 * task.pool_size * row if coordinates else 0.0,
    }


def _embedding_stages(
    measured: Measurement, work: Workload, task: Task, chunk: int, images: int, shards: int, coordinates: bool
) -> dict[str, dict[str, float]]:
    base, body, classes = measured.base.itemsize, work.body_size, work.num_classes
    storage_type, scores_type = task.precision.storage or measured.base, task.precision.scores or measured.base
    scores = scores_type.itemsize
    kept, scored = image_bytes(work, task.precision, measured.base)
    numbers = work.rows * body + work.width + work.top_classes
    matrix = work.columns**2 * 8 if work.trace else 0
    sums = 3 * matrix + 3 * 8 * body**2  # two sums and a part's share, with its body's as it grows
    part = min(images_per_part(body), images)
    together = min(chunk, part)
    # While a part is embedded: the block's images as bytes, a chunk as floats, its embeddings and those of the part.
    embedding = together * (EMBEDDING_GAPS * measured.embed_bytes + base * measured.image_numbers)
    embedding += (part + together) * base * numbers + min(BLOCK, images) * measured.image_numbers
    # While a part is scored: itself in the scores' type, and the largest structured products, or differences.
    products = part * (2 * (classes - 1) * work.width + 3 * work.rows * body)
    if not work.trace:
        products = part * (4 * work.top_classes + 3 * work.width)
    scoring = (products + (0 if storage_type == scores_type else part * numbers)) * scores
    # While it is summed: itself in float64, its transposed contrasts, and one class's columns.
    pairs = work.top_classes * (body + 2 * work.top_classes)
    summing = part * (numbers + pairs + (classes - 1) * work.width) * 8
    model = {"model": shards * measured.model_bytes}
    embedded = {**model, "embeddings": float(shards * images * kept)}
    broadcast = 2 * work.columns**2 * scores if work.trace else 0  # the two matrices as shards use them
    picks = math.ceil(work.oversample * task.query_size)
    selecting = {**embedded, "scores": shards * images * scored, "matrices": float(broadcast)}
    if coordinates:
        selecting["embeddings"] += (picks + (0 if work.trace else 3 * task.num_labeled)) * numbers * base
        selecting["matrices"] += (4 if work.oversample > 1 else 2) * matrix
    batch = DIAGONAL_GAPS * measured.diagonal_bytes + measured.diagonal_batch * base * measured.image_numbers
    stages = {
        # The sum so far and a batch's while the next is computed.
        "rank the parameters": {
            **model,
            "gradients": shards * batch,
            "parameters": 16 * measured.num_body_parameters * coordinates,
            "images": 2 * work.fisher_samples * measured.image_numbers * coordinates,  # of each shard, then of all
        },
        "embed the pool": {**embedded, "gradients": shards * embedding},
        "score the pool": {**selecting, "products": float(shards * scoring)},
    }
    if work.trace:
        stages["sum the information"] = {
            **embedded,
            "matrices": float(shards * sums),
            "products": float(shards * summing),
        }
    if coordinates:
        # The mean, all of them in a row, sorted, their order, and what sorting takes; or a random order.
        sorting = SORT_BYTES if work.fisher_samples else 16
        stages["order the parameters"] = {**model, "parameters": float(sorting * measured.num_body_parameters)}
        stages["verify the gradients"] = {**model, "gradients": measured.verification_bytes}
        if work.trace:  # M, its factor, its inverse R, F, R F and H = R F R
            stages["invert the information"] = {**embedded, "matrices": 6.0 * matrix}
        if work.trace and work.oversample > 1:
            # M, F, R and H stay while the same are computed of the images left.
            pruned = 8.0 * picks * (3 * numbers + pairs)
            stages["prune the batch"] = {**model, "matrices": 10.0 * matrix, "products": pruned}
        if work.error_samples:
            stages["measure the approximation"] = {**selecting, "products": _comparison_bytes(measured, work)}
    for parts in stages.values():
        parts["libraries"] = TRACE_LIBRARIES if work.trace else DISTANCE_LIBRARIES
    return stages


def _comparison_bytes(measured: Measurement, work: Workload) -> float:
    """Return the bytes while the error of keeping few classes is measured: exact embeddings, and rows by rows."""
    count, rows = work.error_samples, work.exact_rows
    numbers = rows * work.body_size + work.width + work.num_classes
    embedding = min(count, ALIGNMENT) * measured.exact_bytes + 2 * count * numbers * measured.base.itemsize
    products = 8 * count * (numbers + 2 * rows * work.num_classes) + 6 * 8 * (count * rows) ** 2
    return max(embedding, products)

"""Estimates of the memory and time of a query, from the shapes of tensors and the measured costs of operations."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fishermask.learning.training import PREDICTION_BATCH
from fishermask.planning.workload import Cost, Measurement, shortest_seconds
from fishermask.pool.blocks import BLOCK, PREDICTED, images_per_part
from fishermask.tensors.precision import Precision

PROCESS_BYTES = 0.5e9
"""Bytes of an idle process with Python, PyTorch and Ray. Measured with torch 2.14 built for CUDA, without a GPU: 480 MB
for a trial that trains ``mlp``, and 400 MB for a Ray shard without a model."""

# Fitted to the peaks of benchmarks/memory.py.
EMBEDDING_LIBRARIES, PREDICTION_LIBRARIES = 32e6, 5e6
"""Bytes of kernels and thread pools, in a query that embeds the pool and in any other query."""
SLACK = 0.1
"""Share of the memory that the allocator cannot return."""
GRADIENT_GAPS, PREDICTION_GAPS, TRAINING_GAPS = 0.28, 0.75, 1.5
"""Unused bytes of the heap per byte of live tensors: in gradient computations, in predictions and in training."""
MAX_GAPS = 300e6
"""Largest number of unused bytes of the heap, because large tensors are not in the heap."""
RANKING_BYTES = 40
"""Bytes per body parameter while the parameters are ranked."""

# Fitted to the times of benchmarks/scale.py.
STRUCTURED = 2.5
"""Time of structured products, relative to one large matrix product with the same number of operations."""
PAIR_SECONDS, DISTANCE_SECONDS = 1.4e-8, 4e-9
"""Seconds of a pick per image and pair of rows of its embedding, and of a distance per number of an image."""


@dataclass(frozen=True)
class QueryRequest:
    """Sizes and settings of a query."""

    pool_size: int
    batch_size: int
    num_labeled: int = 0
    precision: Precision = Precision()
    training_batch_size: int = 0
    """Images of a training step in the coordinator; 0 if it does not train."""


@dataclass(frozen=True)
class Estimate:
    """Peak memory of a process, beyond its memory before the query."""

    parts: Mapping[str, float]
    """Component -> bytes."""
    stage: str
    """Stage with the largest memory, such as ``embed the pool``."""

    @property
    def total(self) -> float:
        """Peak memory in bytes."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        """Return the total and its parts in the same unit: ``270 MB (embeddings 64, matrices 24)``."""
        unit, digits = (1e9, 2) if self.total >= 1e9 else (1e6, 0)
        sizes = {name: f"{size / unit:.{digits}f}" for name, size in self.parts.items()}
        parts = ", ".join(f"{name} {size}" for name, size in sizes.items() if float(size))
        return f"{format_bytes(self.total)} ({parts})"


def format_bytes(size: float) -> str:
    """Return ``1.23 GB`` or ``45 MB``."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def estimate_memory(
    measured: Measurement,
    request: QueryRequest,
    chunk: int,
    num_images: int,
    num_shards: int = 1,
    coordinates: bool = True,
) -> Estimate:
    """Estimate the peak memory of a process that holds ``num_shards`` shards of ``num_images`` images each.

    Args:
        chunk: number of images whose gradients are computed at once.
        coordinates: whether the process is also the coordinator, which trains, evaluates and leads the query.
    """
    work, stored_bytes = measured.work, measured.stored_bytes
    stages: dict[str, dict[str, float]] = {"start": {}}
    if coordinates and request.training_batch_size:
        stages["train"] = {
            "labeled images": (request.num_labeled + request.batch_size) * stored_bytes,
            "gradients": measured.training.fixed_bytes,
            "activations": _batch_bytes(measured, measured.training, request.training_batch_size, TRAINING_GAPS),
        }
        activations = _batch_bytes(measured, measured.prediction, PREDICTION_BATCH, PREDICTION_GAPS)
        stages["evaluate"] = {"images": PREDICTION_BATCH * stored_bytes, "activations": activations}
    if work.gradient_plan is not None:
        stages |= _embedding_stages(measured, request, chunk, num_images, num_shards, coordinates)
    elif work.uses_model:
        block = min(BLOCK, num_images) * stored_bytes
        activations = _batch_bytes(measured, measured.prediction, min(PREDICTED, num_images), PREDICTION_GAPS)
        stages["predict the pool"] = {
            "images": num_shards * block,
            # The next block is read before the previous block is freed, when no activations are alive.
            "activations": num_shards * max(activations, block if num_images > BLOCK else 0),
            # Three copies: the pieces, their concatenation, and the probabilities of the candidates.
            "probabilities": 3 * request.pool_size * measured.num_classes * measured.dtype.itemsize * coordinates,
        }
    stage = max(stages, key=lambda stage: sum(stages[stage].values()))
    parts = {"model": max(num_shards, coordinates) * measured.model_bytes} | stages[stage]
    libraries = EMBEDDING_LIBRARIES if work.gradient_plan else PREDICTION_LIBRARIES
    return Estimate(parts | {"libraries": libraries + SLACK * sum(parts.values())}, stage)


def _batch_bytes(measured: Measurement, cost: Cost, count: int, gaps: float) -> float:
    """Return the bytes of an operation on ``count`` images: its tensors, its inputs and gaps of the heap."""
    return count * (cost.image_bytes + measured.input_bytes) + min(gaps * count * cost.image_bytes, MAX_GAPS)


def _embedding_stages(
    measured: Measurement, request: QueryRequest, chunk: int, num_images: int, num_shards: int, coordinates: bool
) -> dict[str, dict[str, float]]:
    """Return the bytes of each component in each stage of a query that embeds the pool."""
    work, rows, numbers, dtype = measured.work, measured.rows, measured.numbers, measured.dtype
    body, matrix = work.body_size, 8 * measured.columns**2 * work.trace
    storage, scores = request.precision.storage or dtype, request.precision.scores or dtype
    # A shard stores probabilities in the type of the model, and with ``top_classes`` also the indices of their classes.
    embedding = (numbers - measured.classes) * storage.itemsize + measured.classes * dtype.itemsize
    embedding += 8 * (work.top_classes or 0)
    num_copies = math.ceil(work.oversample * request.batch_size) + (0 if work.trace else 3 * request.num_labeled)
    embeddings = {
        "embeddings": num_shards * num_images * embedding + num_copies * numbers * dtype.itemsize * coordinates
    }
    # A shard computes the embeddings of one chunk at a time, and the products of one part at a time.
    part = min(images_per_part(body), num_images)
    chunk = min(chunk, part)
    gradients = _batch_bytes(measured, measured.embedding, chunk, GRADIENT_GAPS)
    gradients += part * numbers * dtype.itemsize + min(BLOCK, num_images) * measured.stored_bytes
    products = (measured.num_classes - 1) * measured.width + 2 * rows * body if work.trace else 2 * numbers
    diagonal = _batch_bytes(measured, measured.diagonal, measured.diagonal_batch, GRADIENT_GAPS)
    stages: dict[str, dict[str, float]] = {
        "verify the gradients": {"gradients": measured.verification_bytes * coordinates},
        "embed the pool": embeddings | {"gradients": num_shards * gradients},
        "score the pool": {
            **embeddings,
            "scores": num_shards * num_images * (2 * rows**2 if work.trace else 1) * scores.itemsize,
            # Sums over the pool, over the labeled images and over a part; for each, also the block of the body.
            "matrices": num_shards * 3 * (matrix + 8 * body**2 * work.trace),
            "products": num_shards * 8 * part * products,
        },
        # M, its factor, its inverse R, F, R F and H = R F R; pruning recomputes some of them.
        "invert the information": {
            **embeddings,
            "matrices": (10 if work.oversample > 1 else 6) * matrix * coordinates,
        },
    }
    if body:
        stages["rank the parameters"] = {
            "gradients": num_shards * (measured.diagonal.fixed_bytes + diagonal),
            "parameters": RANKING_BYTES * measured.num_body_parameters * coordinates,
            "images": 2 * work.fisher_samples * measured.stored_bytes * coordinates,
        }
    return stages


def estimate_seconds(measured: Measurement, request: QueryRequest, num_images: int) -> float:
    """Estimate the seconds of a query with one core per shard, whose largest shard has ``num_images`` images."""
    work, rows, classes, width = measured.work, measured.rows, measured.num_classes, measured.width
    if work.gradient_plan is None:
        return measured.prediction.image_seconds * num_images * work.uses_model
    sample_share = min(1.0, work.fisher_samples / request.pool_size)
    seconds = num_images * (measured.embedding.image_seconds + sample_share * measured.diagonal.image_seconds)
    picks, body = round(work.oversample * request.batch_size), work.body_size
    if not work.trace:
        comparisons = (picks + request.num_labeled) * num_images
        return seconds + DISTANCE_SECONDS * comparisons * (classes + width)
    # Operations per image: the sum of the information and the first scores, then each pick.
    start = 6 * (measured.classes * classes / 2 * width**2 + 2 * classes * width * body + rows * body**2)
    pick = 4 * rows * ((classes - 1) * width + rows * body)
    # Operations of the coordinator: an inverse and two k x k products, then one product per pick.
    coordinator = 8 * measured.columns**3 + 8 * picks * rows * measured.columns**2
    operations = STRUCTURED * num_images * (start + picks * pick) + coordinator
    return seconds + operations / core_flops() + PAIR_SECONDS * picks * num_images * rows**2


@functools.cache
def core_flops() -> float:
    """Return the operations per second of one core in a float32 matrix product, measured once."""
    matrix = torch.ones(512, 512)
    return 2 * 512**3 / shortest_seconds(lambda: matrix @ matrix)

"""About how long a query takes: a model of seconds in n, C, k and the batch, as ``benchmarks/scale.py`` fits it."""

import functools
import time

import torch

from fishermask.planning.measurement import Measurement
from fishermask.planning.workload import Workload

HEAD, BODY = 1.1, 3.5
"""Structured products: seconds for each second that as many operations take in one large matrix product."""
PAIR_SECONDS = 1.4e-8
"""Added for each pair of an image's rows in a pick: seconds on one core."""
DISTANCE_SECONDS = 4e-9
"""A distance between two images, for each of their numbers."""
WHOLE_CHUNK = 1.3
"""How many times as long a prediction takes for an image of a whole chunk as for one of a few, whose activations stay
in the cache: 0.7 to 1.4 for most networks of this package, 2.5 for ``small_cnn`` on 96x96 pixels."""


@functools.cache
def core_flops() -> float:
    """Return the operations per second of one core in a float32 matrix product, measured once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a, times = torch.ones(512, 512), []
    for _ in range(10):
        started = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return 2 * 512**3 / min(times)


def pick_seconds(n: int, work: Workload) -> float:
    """Return the time of one pick by the trace objective among ``n`` images, on one core."""
    operations = 4.0 * n * work.rows * (HEAD * (work.num_classes - 1) * work.width + BODY * work.rows * work.body_size)
    return operations / core_flops() + PAIR_SECONDS * n * work.rows**2


def start_seconds(n: int, work: Workload) -> float:
    """Return the time of the information's sums and the first scores of ``n`` images, on one core."""
    rows, width, body_size = work.rows, work.width, work.body_size
    approximate = work.top_classes < work.num_classes
    pairs = work.top_classes * (work.num_classes if approximate else (work.num_classes + 1) / 2)
    head, cross, body = pairs * width**2, work.num_classes * width * body_size, rows * body_size**2
    operations = 2.0 * n * (3 * head + 2 * rows * body_size * width + 2 * cross + 2.5 * body + 2 * rows**2 * body_size)
    return BODY * operations / core_flops()


def comparison_seconds(measured: Measurement, work: Workload) -> float:
    """Return the time to measure the error of keeping few classes: exact embeddings, and two systems of their rows."""
    # A system's solution takes 8/3 n^3 operations, in float64, of which there are half as many a second.
    solutions = 2 * 2 * 8 / 3 * (work.error_samples * work.exact_rows) ** 3 / core_flops()
    return work.error_samples * measured.exact_seconds + solutions


def query_seconds(measured: Measurement, images: int, size: int, query: int, labeled: int = 0) -> float:
    """Return the time of a query of ``query`` images from a pool of ``size``.

    Args:
        images: of the largest shard, which has one core.
        labeled: images labeled before; some strategies compare all others with each of them.
    """
    work = measured.work
    if work is None:
        return 0.0
    if work.layout is None:
        return WHOLE_CHUNK * measured.prediction_seconds * images
    picks = round(query * work.oversample)
    total = measured.diagonal_seconds * min(work.fisher_samples, size) * images / size
    total += measured.embed_seconds * images
    if not work.trace:
        return total + (picks + labeled) * DISTANCE_SECONDS * images * (work.num_classes + work.width)
    # In the coordinator: an inverse and two products of k x k, then a product with 2 rows for each pick.
    coordinator = 8.0 * work.columns**3 + picks * 8.0 * work.columns**2 * work.rows
    total += start_seconds(images, work) + picks * pick_seconds(images, work) + coordinator / core_flops()
    return total + (comparison_seconds(measured, work) if work.error_samples else 0.0)

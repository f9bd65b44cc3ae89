"""About how long a query takes: a model of seconds in n, C, k and the batch, as ``benchmarks/scale.py`` fits it."""

import functools
import time

import torch

from fishermask.tensors.memory import PredictionProbe, Probe, Workload

HEAD, BODY = 1.1, 3.5
"""Structured products: seconds for each second that as many operations take in one large matrix product."""
PAIR_SECONDS = 1.4e-8
"""Each of an image's R^2 pairs of rows, in a pick, on top: seconds on one core."""

DISTANCE_SECONDS = 4e-9
"""A distance between two images, for each number of theirs."""

WHOLE_CHUNK = 1.3
"""How many times as long a prediction takes for an image of a whole chunk as for one of a few, whose activations stay
in the cache: 0.7 to 1.4 for most networks of this package, 2.5 for ``small_cnn`` on 96x96 pixels."""


@functools.cache
def core_flops() -> float:
    """Operations a second of one core in a float32 matrix product, measured once."""
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
    """One pick by the trace objective among ``n`` images, on one core."""
    contrasts, rows = work.num_classes - 1, work.rows
    operations = 4.0 * n * rows * (HEAD * contrasts * work.width + BODY * rows * work.body_size)
    return operations / core_flops() + PAIR_SECONDS * n * rows**2


def start_seconds(n: int, work: Workload) -> float:
    """The sums of the information and the first scores of ``n`` images, on one core."""
    rows, width, body_size = work.rows, work.width, work.body_size
    pairs = work.kept * (work.num_classes if work.kept < work.num_classes else (work.num_classes + 1) / 2)
    head, cross, body = pairs * width**2, work.num_classes * width * body_size, rows * body_size**2
    operations = 2.0 * n * (3 * head + 2 * rows * body_size * width + 2 * cross + 2.5 * body + 2 * rows**2 * body_size)
    return BODY * operations / core_flops()


def comparison_seconds(probe: Probe) -> float:
    """The error of keeping few classes, measured on a sample: exact embeddings, and two systems of all their rows."""
    work = probe.work
    # A system's solution takes 8/3 n^3 operations, in float64, of which there are half as many a second.
    return work.sampled * probe.exact_seconds + 2 * 2 * 8 / 3 * (work.sampled * work.exact_rows) ** 3 / core_flops()


def query_seconds(probe: Probe, images: int, size: int, query: int, labeled: int = 0) -> float:
    """A query of ``query`` images from a pool of ``size``, with ``images`` of it on each shard, which has one core.

    ``labeled`` images are labeled before; some strategies compare all others with each of them.
    """
    work = probe.work
    query = round(query * work.oversample)
    share = images / size
    total = probe.diagonal_seconds * min(work.ranked, size) * share + probe.embed_seconds * images
    if work.trace:
        # Where the selection is led: an inverse and two products of k x k, then a product with k x 2R a pick.
        led = 8.0 * work.size**3 + query * 8.0 * work.size**2 * work.rows
        total += start_seconds(images, work) + query * pick_seconds(images, work) + led / core_flops()
        total += comparison_seconds(probe) if work.approximate else 0.0
    else:
        total += (query + labeled) * DISTANCE_SECONDS * images * (work.num_classes + work.width)
    return total


def prediction_seconds(probe: PredictionProbe, images: int) -> float:
    """A query that only predicts, with ``images`` of the pool on each shard, which has one core."""
    return WHOLE_CHUNK * probe.seconds * images

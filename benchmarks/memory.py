"""What a query was estimated to need against what it took: the process's peak while it ran, beyond what it held before.

    python benchmarks/memory.py

Each case runs in a process of its own, on random images; the peak is the kernel's (VmHWM), so this needs Linux.
"""

import multiprocessing
from pathlib import Path

import torch
from table import machine, show

from fishermask.pool.plan import plan
from fishermask.pool.pool import Engine, Pool
from fishermask.pool.selection import TraceOptions, minimise_trace
from fishermask.pool.shards import LocalShards
from fishermask.tensors import models
from fishermask.tensors.images import Statistics, normalise
from fishermask.tensors.layout import inspect
from fishermask.tensors.mask import global_mask, head_size, mask_size
from fishermask.tensors.memory import Probe, readable, workload
from fishermask.tensors.precision import Precision

CASES = [
    # model, image shape, images, fraction, shards, chunk's memory (GB), storage
    ("small_cnn", (1, 28, 28), 5_000, 0.03, 1, None, torch.float32),
    ("small_cnn", (1, 28, 28), 60_000, 0.03, 1, None, torch.float32),
    ("small_cnn", (1, 28, 28), 60_000, 0.03, 2, None, torch.float32),
    ("small_cnn", (1, 28, 28), 60_000, 0.03, 1, None, torch.bfloat16),
    ("thin_resnet18", (3, 32, 32), 4_000, 0.002, 1, None, torch.float32),
    ("thin_resnet18", (3, 32, 32), 4_000, 0.01, 1, None, torch.float32),
]


def status(field: str) -> float:
    """A line of this process's memory report, in bytes."""
    return 1024.0 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def query(name, shape, size, fraction, shards, memory, storage, results):
    """Estimate one query, run it, and put both peaks on the queue."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = models.build(name, {}, shape, 10, seed=0).eval()
    images = torch.randint(0, 256, (size, *shape), dtype=torch.uint8)
    statistics = Statistics((0.5,) * shape[0], (0.25,) * shape[0])
    with torch.no_grad():  # let batch norm see data once
        model.train()(normalise(images[:64], statistics))
    model.eval().requires_grad_(False)
    layout = inspect(model, normalise(images[:2], statistics))
    body_size = mask_size(model, layout, fraction) - head_size(model, layout)
    example = normalise(images[:2], statistics)
    work = workload(model, example, layout, body_size, ranked=1024)
    precision = Precision(storage=storage)
    probe = Probe(model, example[:1], work)
    found = plan(probe, size, 10, shards, True, precision, None if memory is None else memory * 1e9)
    engine = Engine(precision, chunk=found.chunk, diagonal_batch=found.diagonal_batch)

    def run(images, samples):
        labeled, generators = torch.arange(20), (torch.Generator(), torch.Generator())
        local = LocalShards(images, statistics, shards)
        pool = Pool(local, len(images), labeled, torch.zeros_like(labeled), model, *generators, engine=engine)
        mask = global_mask(pool.fisher_diagonal(layout, samples), layout, body_size)
        minimise_trace(pool, mask, 10, TraceOptions())

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run(images, 64)
    results.put((work.size, found.chunk, found.process.total, status("VmHWM") - before, found.process.moment))


def main():
    rows = []
    context = multiprocessing.get_context("spawn")
    for case in CASES:
        results = context.Queue()
        process = context.Process(target=query, args=(*case, results))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{case} failed")
        k, chunk, estimated, measured, moment = results.get()
        name, _, size, _, shards, _, storage = case
        kind = str(storage).removeprefix("torch.")
        cells = [name, size, k, shards, kind, chunk, moment, readable(estimated), readable(measured)]
        rows.append([*cells, estimated / measured])
    header = ["model", "images", "k", "shards", "storage", "chunk", "worst while it", "estimated", "measured"]
    show(f"Memory of a query. {machine()}", [*header, "estimated/measured"], rows)


if __name__ == "__main__":
    main()

"""The estimated memory of a query against the measured: the peak of a process during it, beyond what it held before.

    python benchmarks/memory.py              # all cases
    python benchmarks/memory.py badge bait   # those whose strategy's name is given
    python benchmarks/memory.py --stages     # also the measured peak of each stage

Each case runs a strategy as a run of a sweep does, in a process of its own, on random images. The peak is the kernel's
(VmHWM), so this needs Linux. Seconds are those of the query alone, on one thread; they are estimated for cores that do
nothing else.
"""

import argparse
import multiprocessing
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from table import machine, show

from fishermask import strategies
from fishermask.config import StrategyConfig
from fishermask.pool.plan import plan, plan_prediction
from fishermask.pool.pool import Engine, Pool
from fishermask.pool.shards import LocalShards
from fishermask.tensors import models
from fishermask.tensors.images import Statistics, normalise
from fishermask.tensors.kernels import return_memory
from fishermask.tensors.memory import Prediction, PredictionProbe, Probe, readable
from fishermask.tensors.precision import Precision

GRAY, COLOR, LARGE = (1, 28, 28), (3, 32, 32), (3, 96, 96)
LABELED, BUDGET = 20, 10


class Case(NamedTuple):
    """One row of the table."""

    strategy: str
    params: dict[str, Any]
    model: str
    shape: tuple[int, int, int]
    images: int
    classes: int = 10
    shards: int = 1
    storage: torch.dtype = torch.float32
    labeled: int = LABELED
    model_params: dict[str, Any] = {}  # noqa: RUF012  never changed


CASES = [
    Case("fisher_mask", {"fraction": 0.03}, "small_cnn", GRAY, 5_000),
    Case("fisher_mask", {"fraction": 0.03}, "small_cnn", GRAY, 60_000),
    Case("fisher_mask", {"fraction": 0.03}, "small_cnn", GRAY, 60_000, shards=2),
    Case("fisher_mask", {"fraction": 0.03}, "small_cnn", GRAY, 60_000, storage=torch.bfloat16),
    Case("fisher_mask", {"fraction": 0.002}, "thin_resnet18", COLOR, 4_000),
    Case("fisher_mask", {"fraction": 0.01}, "thin_resnet18", COLOR, 4_000),
    Case("fisher_mask", {"fraction": 0.005, "mask": "layerwise"}, "small_cnn", LARGE, 4_000),
    Case("fisher_mask", {"fraction": 0.0004}, "mlp", LARGE, 2_000),
    Case("fisher_mask", {"fraction": 0.03, "oversample": 2.0}, "small_cnn", GRAY, 5_000),
    Case("bait", {"top_classes": 5}, "small_cnn", GRAY, 4_000, classes=60),
    Case("bait", {}, "small_cnn", LARGE, 4_000),
    Case("coreset", {}, "thin_resnet18", COLOR, 6_000, labeled=2_000),
    Case("badge", {}, "thin_resnet18", COLOR, 4_000, classes=100),
    Case("entropy", {}, "mlp", LARGE, 5_000),
    Case("entropy", {}, "thin_resnet18", COLOR, 5_000, shards=2),
    Case("entropy", {}, "mlp", COLOR, 20_000, model_params={"width": 1024, "depth": 3}),
]


class Copies:
    """Images that are copied wherever they are read, as those of a data set are whose imbalance leaves images out."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.shape = images, tuple(images.shape)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, selection: slice | torch.Tensor) -> torch.Tensor:
        found = self.images[selection]
        return found.clone() if isinstance(selection, slice) else found

    def narrow(self, dim: int, start: int, length: int) -> "Copies":
        return Copies(self.images.narrow(dim, start, length))


def status(field: str) -> float:
    """A line of this process's memory report, in bytes."""
    return 1024.0 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


class Stages:
    """The peak of memory in each stage of a query, told its progress."""

    def __init__(self) -> None:
        self.before, self.peaks, self.stage = status("VmRSS"), dict[str, float](), "start"
        Path("/proc/self/clear_refs").write_text("5")

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self.stage:
            peak = status("VmHWM") - self.before
            self.peaks[self.stage] = max(peak, self.peaks.get(self.stage, 0.0))
            self.stage = stage
            Path("/proc/self/clear_refs").write_text("5")


def query(case: Case, results: Any) -> None:
    """Estimate one query, run it, and put both peaks on the queue."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = models.build(case.model, case.model_params, case.shape, case.classes, seed=0).eval()
    images = torch.randint(0, 256, (case.images, *case.shape), dtype=torch.uint8)
    channels = case.shape[0]
    statistics = Statistics((0.5,) * channels, (0.25,) * channels)
    with torch.no_grad():  # let batch norm see data once
        model.train()(normalise(images[:64], statistics))
    model.eval().requires_grad_(False)
    strategy = strategies.load(StrategyConfig(name=case.strategy, params=case.params))
    example, precision = normalise(images[:2], statistics), Precision(storage=case.storage)
    work = strategy.check(model, example)
    if isinstance(work, Prediction):
        found = plan_prediction(PredictionProbe(model, example[:1], work), case.images, case.shards, True)
    else:
        assert work is not None
        probe = Probe(model, example[:1], work)
        found = plan(probe, case.images, BUDGET, case.shards, True, precision, labeled=case.labeled)
    engine = Engine(precision, chunk=found.chunk, diagonal_batch=found.diagonal_batch)
    return_memory()
    stages = Stages()
    started = time.perf_counter()
    shards = LocalShards(Copies(images), statistics, case.shards)
    labeled, generators = torch.arange(case.labeled), (torch.Generator(), torch.Generator())
    labels = torch.zeros_like(labeled)
    pool = Pool(shards, len(images), labeled, labels, model, *generators, progress=stages, engine=engine)
    strategy.query(pool, BUDGET)
    seconds = time.perf_counter() - started
    stages("", 0, 1)
    size = None if isinstance(work, Prediction) else work.size
    results.put((size, found.chunk, found.process, max(stages.peaks.values()), found.seconds, seconds, stages.peaks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("strategies", nargs="*")
    parser.add_argument("--stages", action="store_true")
    arguments = parser.parse_args()
    rows: list[list[object]] = []
    context = multiprocessing.get_context("spawn")
    for number, case in enumerate(CASES, start=1):
        if arguments.strategies and not {case.strategy, str(number)} & set(arguments.strategies):
            continue
        results = context.Queue()
        process = context.Process(target=query, args=(case, results))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{case} failed")
        size, chunk, estimate, measured, seconds_estimated, seconds, stages = results.get()
        if arguments.stages:
            print(number, case.strategy, case.model, {name: readable(peak) for name, peak in stages.items()}, estimate)
        shape = "x".join(map(str, case.shape[1:])) + (f"x{case.shape[0]}" if case.shape[0] > 1 else "")
        options = [f"{key} {value}" for key, value in case.params.items()]
        options += [f"{case.shards} shards"] * (case.shards > 1)
        options += [f"storage {str(case.storage).removeprefix('torch.')}"] * (case.storage != torch.float32)
        options += [f"{case.labeled:,} labeled"] * (case.labeled != LABELED)
        options += [f"{key} {value:,}" for key, value in case.model_params.items()]
        cells = [number, case.strategy, ", ".join(options), case.model, shape, f"{case.images:,}", case.classes]
        cells += ["" if size is None else f"{size:,}", chunk, estimate.moment]
        cells += [readable(estimate.total), readable(measured), f"{estimate.total / measured:.2f}"]
        rows.append([*cells, f"{seconds_estimated:.2g}", f"{seconds:.2g}"])
    header = ["", "strategy", "options", "model", "image", "images", "C", "k - E", "chunk", "worst while it"]
    header += ["estimated", "measured", "estimated/measured", "estimated s", "measured s"]
    show(f"Memory of a query. {machine()}", header, rows)


if __name__ == "__main__":
    main()

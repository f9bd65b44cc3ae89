"""The estimated memory of training and of a query against the measured peak, beyond what the process held before.

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

from fishermask import query_strategies
from fishermask.config import StrategyConfig
from fishermask.learning import models
from fishermask.learning.training import fit, predict
from fishermask.planning.measurement import measure
from fishermask.planning.memory import Task, format_bytes
from fishermask.planning.query_plan import plan_query
from fishermask.pool.pool import Engine, Pool
from fishermask.pool.shards import LocalShards
from fishermask.tensors.images import Statistics, normalize
from fishermask.tensors.precision import Precision
from fishermask.tensors.runtime import return_memory
from fishermask.tensors.slow_gradients import copy_model

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
    training_batch: int = 0
    """Images of a training step, where a round's training and evaluation are measured too."""


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
    Case("random", {}, "small_cnn", GRAY, 5_000, labeled=500, training_batch=64),
    Case("random", {}, "thin_resnet18", COLOR, 5_000, labeled=500, training_batch=64),
    Case("random", {}, "thin_resnet18", COLOR, 5_000, labeled=2_000, training_batch=512),
    Case("random", {}, "mlp", COLOR, 5_000, model_params={"width": 4096, "depth": 3}, labeled=500, training_batch=64),
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
        model.train()(normalize(images[:64], statistics))
    model.eval()
    strategy = query_strategies.load(StrategyConfig(name=case.strategy, params=case.params))
    example, precision = normalize(images[:2], statistics), Precision(storage=case.storage)
    work = strategy.check(model, example)
    measured = measure(model, example[:1], work, training=bool(case.training_batch))
    task = Task(case.images, BUDGET, case.labeled, precision, case.training_batch)
    plan = plan_query(measured, task, case.shards)
    engine = Engine(precision, chunk=plan.chunk, diagonal_batch=plan.diagonal_batch)
    if case.training_batch:  # what the first training of a process loads belongs to the process
        train(
            case._replace(training_batch=2, labeled=4), models.build("mlp", {}, case.shape, 10, 0), images, statistics
        )
    return_memory()
    stages = Stages()
    started = time.perf_counter()
    if case.training_batch:
        train(case, copy_model(model), images, statistics)
        stages("query", 0, 1)
    shards = LocalShards(Copies(images), statistics, case.shards)
    labeled, generators = torch.arange(case.labeled), (torch.Generator(), torch.Generator())
    labels = torch.zeros_like(labeled)
    pool = Pool(shards, len(images), labeled, labels, model, *generators, progress=stages, engine=engine)
    strategy.query(pool, BUDGET)
    seconds = time.perf_counter() - started
    stages("", 0, 1)
    size = work.columns if work is not None and work.layout is not None else None
    results.put((size, plan.chunk, plan.coordinator, max(stages.peaks.values()), plan.seconds, seconds, stages.peaks))


def train(case: Case, model: torch.nn.Module, images: torch.Tensor, statistics: Statistics) -> None:
    """Train for one epoch on the labeled images and predict as many as a test set has, as a round does."""
    settings: dict[str, Any] = {"learning_rate": 1e-3, "target_accuracy": 1.0, "max_epochs": 1, "clip": 0.1}
    settings |= {"batch_size": case.training_batch, "augmentation": None}
    labels = torch.arange(case.labeled) % case.classes
    fit(model, images[: case.labeled].clone(), labels, statistics, torch.Generator(), **settings)
    predict(model, images[:2000], statistics)


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
            print(
                number, case.strategy, case.model, {name: format_bytes(peak) for name, peak in stages.items()}, estimate
            )
        shape = "x".join(map(str, case.shape[1:])) + (f"x{case.shape[0]}" if case.shape[0] > 1 else "")
        options = [f"{key} {value}" for key, value in case.params.items()]
        options += [f"{case.shards} shards"] * (case.shards > 1)
        options += [f"storage {str(case.storage).removeprefix('torch.')}"] * (case.storage != torch.float32)
        options += [f"training batch {case.training_batch}"] * (case.training_batch > 0)
        options += [f"{case.labeled:,} labeled"] * (case.labeled != LABELED)
        options += [f"{key} {value:,}" for key, value in case.model_params.items()]
        cells = [number, case.strategy, ", ".join(options), case.model, shape, f"{case.images:,}", case.classes]
        cells += ["" if size is None else f"{size:,}", chunk, estimate.stage]
        cells += [format_bytes(estimate.total), format_bytes(measured), f"{estimate.total / measured:.2f}"]
        rows.append([*cells, f"{seconds_estimated:.2g}", f"{seconds:.2g}"])
    header = ["", "strategy", "options", "model", "image", "images", "C", "k - E", "chunk", "worst stage"]
    header += ["estimated", "measured", "estimated/measured", "estimated s", "measured s"]
    show(f"Memory of a query. {machine()}", header, rows)


if __name__ == "__main__":
    main()

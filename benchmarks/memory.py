"""Estimated and measured peak memory of training and of queries, beyond the memory of the process before them.

    python benchmarks/memory.py              # all cases
    python benchmarks/memory.py badge 3      # the cases of the strategy badge, and case 3
    python benchmarks/memory.py --stages     # print the measured peak of each stage too

Each case runs a strategy as a run of a sweep does, in a new process, on random images. The peak is the kernel's
(VmHWM), so this needs Linux. Seconds are those of the query alone, on one thread of an idle core.
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
from fishermask.planning.estimates import Estimate, QueryRequest, format_bytes
from fishermask.planning.query_plan import QueryPlan, plan_query
from fishermask.planning.workload import Measurement, measure
from fishermask.pool.pool import Engine, Pool
from fishermask.pool.shards import LocalShards
from fishermask.query_strategies import Strategy
from fishermask.tensors.images import Statistics, normalize
from fishermask.tensors.precision import Precision
from fishermask.tensors.runtime import return_memory
from fishermask.tensors.slow_gradients import copy_model

GRAY, COLOR, LARGE = (1, 28, 28), (3, 32, 32), (3, 96, 96)
LABELED, BUDGET = 20, 10
STATISTICS = {channels: Statistics((0.5,) * channels, (0.25,) * channels) for channels in (1, 3)}


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
    """Images of a training step; 0 to measure the query without training and evaluation."""


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


class CopiedImages:
    """Images that are copied when they are read, as from a data set of which the pool contains only some images."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.shape = images, tuple(images.shape)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, selection: slice | torch.Tensor) -> torch.Tensor:
        images = self.images[selection]
        return images.clone() if isinstance(selection, slice) else images

    def narrow(self, dim: int, start: int, length: int) -> "CopiedImages":
        return CopiedImages(self.images.narrow(dim, start, length))


def process_bytes(field: str) -> float:
    """Return a field of this process's memory report, in bytes."""
    return 1024.0 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


class StagePeaks:
    """Progress callback that records the peak memory of each stage of a query."""

    def __init__(self) -> None:
        self.before, self.peaks, self.stage = process_bytes("VmRSS"), dict[str, float](), "start"
        Path("/proc/self/clear_refs").write_text("5")

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self.stage:
            peak = process_bytes("VmHWM") - self.before
            self.peaks[self.stage] = max(peak, self.peaks.get(self.stage, 0.0))
            self.stage = stage
            Path("/proc/self/clear_refs").write_text("5")


class Result(NamedTuple):
    """The estimates and measurements of one case."""

    columns: int | None
    chunk: int
    estimate: Estimate
    estimated_seconds: float
    peaks: dict[str, float] = {}  # noqa: RUF012  never changed
    """Stage -> measured peak, in bytes."""
    seconds: float = 0.0


def estimate_case(case: Case) -> tuple[torch.nn.Module, Strategy, Measurement, QueryPlan]:
    """Return a case's model and strategy, their measurement, and the plan of the query."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = models.build(case.model, case.model_params, case.shape, case.classes, seed=0)
    with torch.no_grad():  # gives batch norm its statistics
        model.train()(normalize(random_images(64, case.shape), STATISTICS[case.shape[0]]))
    model.eval()
    strategy = query_strategies.load(StrategyConfig(name=case.strategy, params=case.params))
    example = normalize(random_images(2, case.shape), STATISTICS[case.shape[0]])
    measured = measure(model, example[:1], strategy.check(model, example), training=bool(case.training_batch))
    precision = Precision(storage=case.storage)
    request = QueryRequest(case.images, BUDGET, case.labeled, precision, case.training_batch)
    return model, strategy, measured, plan_query(measured, request, case.shards)


def random_images(count: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8)


def run_case(case: Case, results: Any) -> None:
    """Estimate and run one query, and put the result into the queue ``results``."""
    model, strategy, measured, plan = estimate_case(case)
    images, statistics = random_images(case.images, case.shape), STATISTICS[case.shape[0]]
    engine = Engine(Precision(storage=case.storage), chunk=plan.chunk, diagonal_batch=plan.diagonal_batch)
    if case.training_batch:  # the first training of a process loads libraries, which belong to the process
        train(
            case._replace(training_batch=2, labeled=4), models.build("mlp", {}, case.shape, 10, 0), images, statistics
        )
    return_memory()
    peaks = StagePeaks()
    started = time.perf_counter()
    if case.training_batch:
        train(case, copy_model(model), images, statistics)
        peaks("query", 0, 1)
    shards = LocalShards(CopiedImages(images), statistics, case.shards)
    labeled, generators = torch.arange(case.labeled), (torch.Generator(), torch.Generator())
    labels = torch.zeros_like(labeled)
    pool = Pool(shards, len(images), labeled, labels, model, *generators, progress=peaks, engine=engine)
    strategy.query(pool, BUDGET)
    seconds = time.perf_counter() - started
    peaks("", 0, 1)
    columns = None if measured.work.gradient_plan is None else measured.columns
    results.put(Result(columns, plan.chunk, plan.coordinator, plan.seconds, peaks.peaks, seconds))


def train(case: Case, model: torch.nn.Module, images: torch.Tensor, statistics: Statistics) -> None:
    """Train for one epoch on the labeled images and predict 2,000 images, as in a round."""
    settings: dict[str, Any] = {"learning_rate": 1e-3, "target_accuracy": 1.0, "max_epochs": 1, "clip": 0.1}
    settings |= {"batch_size": case.training_batch, "augmentation": None}
    labels = torch.arange(case.labeled) % case.classes
    fit(model, images[: case.labeled].clone(), labels, statistics, torch.Generator(), **settings)
    predict(model, images[:2000], statistics)


def describe_case(number: int, case: Case, result: Result) -> list[object]:
    """Return the cells of a row of the table."""
    shape = "x".join(map(str, case.shape[1:])) + (f"x{case.shape[0]}" if case.shape[0] > 1 else "")
    options = [f"{key} {value}" for key, value in case.params.items()]
    options += [f"{case.shards} shards"] * (case.shards > 1)
    options += [f"storage {str(case.storage).removeprefix('torch.')}"] * (case.storage != torch.float32)
    options += [f"training batch {case.training_batch}"] * (case.training_batch > 0)
    options += [f"{case.labeled:,} labeled"] * (case.labeled != LABELED)
    options += [f"{key} {value:,}" for key, value in case.model_params.items()]
    cells = [number, case.strategy, ", ".join(options), case.model, shape, f"{case.images:,}", case.classes]
    cells += ["" if result.columns is None else f"{result.columns:,}", result.chunk, result.estimate.stage]
    estimated, peak = result.estimate.total, max(result.peaks.values())
    cells += [format_bytes(estimated), format_bytes(peak), f"{estimated / peak:.2f}"]
    return [*cells, f"{result.estimated_seconds:.2g}", f"{result.seconds:.2g}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names of strategies, or numbers of cases")
    parser.add_argument("--stages", action="store_true", help="also print the peak of each stage")
    arguments = parser.parse_args()
    rows: list[list[object]] = []
    context = multiprocessing.get_context("spawn")
    for number, case in enumerate(CASES, start=1):
        if arguments.cases and not {case.strategy, str(number)} & set(arguments.cases):
            continue
        results = context.Queue()
        process = context.Process(target=run_case, args=(case, results))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{case} failed")
        result = results.get()
        if arguments.stages:
            peaks = ", ".join(f"{stage} {format_bytes(peak)}" for stage, peak in result.peaks.items())
            print(f"{number} {case.strategy} {case.model}: {peaks}; estimated {result.estimate}")
        rows.append(describe_case(number, case, result))
    header = ["", "strategy", "options", "model", "image", "images", "C", "k - E", "chunk", "worst stage"]
    header += ["estimated", "measured", "estimated/measured", "estimated s", "measured s"]
    show(f"Memory of a query. {machine()}", header, rows)


if __name__ == "__main__":
    main()

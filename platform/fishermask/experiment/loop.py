"""The active-learning loop: train, evaluate, query, label, until the budget is spent."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fishermask.data.ids import Ids
from fishermask.errors import InputError
from fishermask.experiment.journal import Journal, NoJournal
from fishermask.experiment.run_plan import precision
from fishermask.experiment.setup import Setup
from fishermask.experiment.streams import stream, stream_seed
from fishermask.guard import short
from fishermask.learning.metrics import evaluate
from fishermask.learning.training import fit, predict
from fishermask.planning.query_plan import QueryPlan
from fishermask.pool.pool import Engine, Freshness, Pool, Progress
from fishermask.pool.shards import Shards
from fishermask.tensors.images import Images
from fishermask.tensors.runtime import repeatable_gpu

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
JOURNAL_SECONDS = 1.0
"""Between two times that picks are written down."""

MakeShards = Callable[[Images, Any], Shards]


@dataclass(frozen=True)
class RoundResult:
    """One round: a model trained on ``labels`` images, and the batch that was queried with it."""

    round: int
    labels: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    recall: dict[str, float]
    """By class name."""
    epochs: int
    train_accuracy: float
    ended_by: str
    """``target`` or ``cap``: what ended training."""
    seconds: dict[str, float]
    """By stage: train, evaluate, query, and within the query ``query: embed`` and so on."""
    batch: list[str]
    """Ids queried after this round's training, in the order of choice; empty in the last round."""
    batch_classes: dict[str, int]
    """How many of the batch belong to each class."""
    notes: dict[str, float]
    """What is worth knowing of how the batch was found, by name: the objective's value, the largest drift."""

    def as_dict(self) -> dict[str, Any]:
        """What is written to ``rounds.jsonl``."""
        return asdict(self)


def num_rounds(initial: int, query: int, total: int) -> int:
    """Trained models in a run: one on the initial set and one after each batch."""
    return 1 - (initial - total) // query


def run(
    setup: Setup,
    make_shards: MakeShards,
    history: Sequence[dict[str, Any]] = (),
    progress: Progress = lambda stage, done, total: None,
    journal: Journal = NoJournal(),  # noqa: B008  it has no state
    plan: QueryPlan | None = None,
) -> Iterator[RoundResult]:
    """Yield the result of each round, from the first that is not in ``history``.

    The state of a run is what it labeled and the number of the round, so a run goes on from its past results exactly
    as if it had never stopped. ``journal`` holds the picks of a query under way, which goes on behind them.
    """
    config, pool_data, test = setup.config, setup.data.train, setup.data.test
    budget, training, seed = config.budget, config.training, config.seed
    bought = [name for result in history for name in result["batch"]]
    positions = pool_data.ids.positions(bought)
    if (positions < 0).any() or len(set(bought)) < len(bought):
        raise InputError("rounds.jsonl: holds ids that are not in the pool, or one twice; remove it to run again")
    labeled = torch.cat([setup.initial, positions])
    device = torch.device("cuda" if config.resources.gpus else "cpu")
    if device.type == "cuda":
        repeatable_gpu()
    augment = config.data.augment if config.data.augment is not None else setup.data.image_shape[0] == 3
    engine = Engine(precision(config.engine), config.engine.drift)
    if plan is not None:
        engine = replace(engine, chunk=plan.chunk, diagonal_batch=plan.diagonal_batch)
    shards: Shards | None = None
    try:
        for index in range(len(history), num_rounds(budget.initial, budget.query, budget.total)):
            # Train a fresh model on what is labeled.
            started = time.perf_counter()
            progress("train", 0, 1)
            model = setup.model(index).to(device)
            # Layers such as dropout draw from torch's global generators: seeded here, and left as they were.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(stream_seed(seed, "dropout", index))
                report = fit(
                    model,
                    pool_data.images[labeled].to(device),
                    pool_data.labels[labeled].to(device),
                    setup.statistics,
                    stream(seed, "order", index),
                    **training.model_dump(),
                    augmentation=stream(seed, "augmentation", index) if augment else None,
                )
            # Evaluate it on the test set.
            trained = time.perf_counter()
            progress("evaluate", 0, 1)
            predictions = predict(model, test.images, setup.statistics).argmax(-1).cpu()
            metrics = evaluate(predictions, test.labels, len(setup.data.classes))
            evaluated = time.perf_counter()
            # Query the next batch and label it.
            size = min(budget.query, budget.total - len(labeled))
            batch, notes = labeled[:0], dict[str, float]()
            stages = StageClock(progress)
            if size:
                shards = shards or make_shards(pool_data.images, setup.statistics)
                lost = shards.rebuilt
                notebook = _Notebook(journal, f"{index}-{_digest(model, labeled)}", pool_data.ids)
                pool = Pool(
                    shards,
                    len(pool_data.labels),
                    labeled,
                    pool_data.labels[labeled],
                    model.cpu(),
                    stream(seed, f"strategy {config.strategy.name}", index),
                    stream(seed, "fisher sample", index),
                    stages,
                    replace(engine, past=notebook.past(), journal=notebook.add),
                )
                batch = checked(setup.strategy.query(pool, size), pool.candidates, size)
                notes = pool.notes | ({"shards made again": shards.rebuilt - lost} if shards.rebuilt > lost else {})
            queried = time.perf_counter()
            counts = torch.bincount(pool_data.labels[batch], minlength=len(setup.data.classes)).tolist()
            yield RoundResult(
                round=index,
                labels=len(labeled),
                accuracy=metrics.accuracy,
                balanced_accuracy=metrics.balanced_accuracy,
                macro_f1=metrics.macro_f1,
                recall=dict(zip(setup.data.classes, metrics.recall, strict=True)),
                epochs=report.epochs,
                train_accuracy=report.accuracy,
                ended_by=report.ended_by,
                seconds={
                    "train": trained - started,
                    "evaluate": evaluated - trained,
                    "query": queried - evaluated,
                    **{f"query: {stage}": seconds for stage, seconds in stages.finish().items()},
                },
                batch=[pool_data.ids[i] for i in batch.tolist()],
                batch_classes=dict(zip(setup.data.classes, counts, strict=True)),
                notes=notes,
            )
            labeled = torch.cat([labeled, batch])
    finally:
        if shards is not None:
            shards.close()


class _Notebook:
    """Between a query, which knows positions, and the journal, which outlives this process and knows ids."""

    def __init__(self, journal: Journal, query: str, ids: Ids) -> None:
        self.journal, self.query, self.ids = journal, query, ids
        self.new: list[list[Any]] = []
        self.written = time.monotonic()

    def past(self) -> list[tuple[int, Freshness]]:
        """The picks that an earlier process made in this very query."""
        entries = self.journal.read(self.query)
        positions = self.ids.positions([name for name, _ in entries]).tolist()
        return [(position, Freshness(value)) for position, (_, value) in zip(positions, entries, strict=True)]

    def add(self, position: int, freshness: Freshness) -> None:
        """Keep a pick; those of the last second may be lost."""
        self.new.append([self.ids[position], int(freshness)])
        if time.monotonic() - self.written > JOURNAL_SECONDS:
            self.journal.append(self.query, self.new)
            self.new, self.written = [], time.monotonic()


def _digest(model: nn.Module, labeled: Tensor) -> str:
    """What a query begins with: the trained model, in which all data have left their mark, and what is labeled."""
    digest = hashlib.sha256(labeled.numpy().tobytes())
    for value in model.cpu().state_dict().values():
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


class StageClock:
    """Passes progress on, and keeps how long each stage was the current one."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.current, self.since = "", time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self.current:
            self.finish()
            self.current = stage
        self.progress(stage, done, total)

    def finish(self) -> dict[str, float]:
        """Seconds by stage; the current stage ends now."""
        now = time.perf_counter()
        if self.current:
            self.seconds[self.current] = self.seconds.get(self.current, 0.0) + now - self.since
        self.current, self.since = "", now
        return self.seconds


def checked(batch: Tensor, candidates: Tensor, size: int) -> Tensor:
    """``batch`` if it is exactly ``size`` distinct candidates.

    Raises:
        RuntimeError: the strategy returned something else. Nothing is filled in or cut off in silence.
    """
    if not isinstance(batch, Tensor) or batch.dim() != 1 or batch.dtype not in INTEGERS:
        kind = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else short(batch)
        raise RuntimeError(f"the strategy returned {type(batch).__name__} {kind}; expected a 1-D integer tensor")
    batch = batch.cpu().long()
    if len(batch) != size or len(batch.unique()) != size or not torch.isin(batch, candidates).all():
        raise RuntimeError(
            f"the strategy returned {len(batch)} positions, {len(batch.unique())} distinct, "
            f"{int(torch.isin(batch, candidates).sum())} of them candidates; {size} distinct candidates were due"
        )
    return batch

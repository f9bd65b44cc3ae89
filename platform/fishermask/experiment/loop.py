"""The active-learning loop: train, evaluate, query, label, until the budget is spent."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fishermask.errors import InputError
from fishermask.experiment.inputs import RunInputs
from fishermask.experiment.journal import Journal, NoJournal, QueryJournal
from fishermask.experiment.run_plan import precision
from fishermask.experiment.streams import stream, stream_seed
from fishermask.guard import short
from fishermask.learning.metrics import evaluate
from fishermask.learning.training import fit, predict
from fishermask.planning.query_plan import QueryPlan
from fishermask.pool.pool import Engine, Pool, Progress
from fishermask.pool.shards import Shards
from fishermask.tensors.images import Images
from fishermask.tensors.runtime import repeatable_gpu

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MakeShards = Callable[[Images, Any], Shards]


@dataclass(frozen=True)
class RoundResult:
    """The result of one round: a model trained on ``labels`` images, and the batch that it queried."""

    round: int
    labels: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    recall: dict[str, float]
    """By class name; NaN for a class that is not in the test set."""
    epochs: int
    train_accuracy: float
    ended_by: str
    """Why training ended: ``target`` (accuracy reached) or ``cap`` (maximum number of epochs)."""
    seconds: dict[str, float]
    """Duration by stage: train, evaluate, query, and the stages of the query, such as ``query: embed``."""
    batch: list[str]
    """Ids that were queried after training, in the order of choice; empty in the last round."""
    batch_classes: dict[str, int]
    """Number of images of the batch by class name."""
    notes: dict[str, float]
    """Numbers that describe the query, by name, such as the value of the objective and the largest drift."""
    initial: list[str]
    """Ids of the images that were labeled at the start; empty after round 0."""

    def as_dict(self) -> dict[str, Any]:
        """Return the record that is written to ``rounds.jsonl``."""
        return asdict(self)


def run(
    inputs: RunInputs,
    make_shards: MakeShards,
    history: Sequence[dict[str, Any]] = (),
    progress: Progress = lambda stage, done, total: None,
    journal: Journal = NoJournal(),  # noqa: B008  it has no state
    plan: QueryPlan | None = None,
) -> Iterator[RoundResult]:
    """Yield the result of each round, starting after the rounds in ``history``.

    The state of a run is its labeled set and the number of its round, so a resumed run gives the same results as an
    uninterrupted run. A query in progress resumes after the picks in ``journal``.

    Raises:
        InputError: ``history`` does not belong to this pool.
    """
    config, classes, pool_data, test = inputs.config, inputs.data.classes, inputs.data.train, inputs.data.test
    budget, training, seed = config.budget, config.training, config.seed
    labeled = _resume(inputs, history)
    device = torch.device("cuda" if config.resources.gpus else "cpu")
    if device.type == "cuda":
        repeatable_gpu()
    augment = config.data.augment if config.data.augment is not None else inputs.data.image_shape[0] == 3
    engine = Engine(precision(config.engine), config.engine.drift)
    if plan is not None:
        engine = replace(engine, chunk=plan.chunk, diagonal_batch=plan.diagonal_batch)
    shards: Shards | None = None
    try:
        for index in range(len(history), budget.num_rounds):
            # Train a fresh model on the labeled set.
            started = time.perf_counter()
            progress("train", 0, training.max_epochs)
            model = inputs.build_model(index).to(device)
            # Layers such as dropout use PyTorch's global generators: seed them, and restore them afterwards.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(stream_seed(seed, "dropout", index))
                report = fit(
                    model,
                    pool_data.images[labeled].to(device),
                    pool_data.labels[labeled].to(device),
                    inputs.statistics,
                    stream(seed, "order", index),
                    **training.model_dump(),
                    augmentation=stream(seed, "augmentation", index) if augment else None,
                    progress=partial(progress, "train"),
                )
            # Evaluate the model on the test set.
            trained = time.perf_counter()
            progress("evaluate", 0, 1)
            logits = predict(model, test.images, inputs.statistics, partial(progress, "evaluate"))
            predictions = logits.argmax(-1).cpu()
            metrics = evaluate(predictions, test.labels, len(classes))
            evaluated = time.perf_counter()
            # Query the next batch.
            size = min(budget.query, budget.total - len(labeled))
            batch, notes = labeled[:0], dict[str, float]()
            stages = StageClock(progress)
            if size:
                shards = shards or make_shards(pool_data.images, inputs.statistics)
                num_rebuilt_before = shards.num_rebuilt
                query_journal = QueryJournal(journal, f"{index}-{_state_hash(model, labeled)}", pool_data.ids)
                pool = Pool(
                    shards,
                    len(pool_data.labels),
                    labeled,
                    pool_data.labels[labeled],
                    model.cpu(),
                    stream(seed, f"strategy {config.strategy.short_name}", index),
                    stream(seed, "fisher sample", index),
                    stages,
                    replace(engine, past_picks=query_journal.past_picks(), record_pick=query_journal.add),
                )
                candidates = pool.candidates.clone()  # the strategy may write to the attributes of the pool
                batch = validate_batch(inputs.strategy.query(pool, size), candidates, size)
                num_rebuilt = shards.num_rebuilt - num_rebuilt_before
                notes = pool.notes | ({"rebuilt shards": num_rebuilt} if num_rebuilt else {})
            queried = time.perf_counter()
            counts = torch.bincount(pool_data.labels[batch], minlength=len(classes)).tolist()
            yield RoundResult(
                round=index,
                labels=len(labeled),
                accuracy=metrics.accuracy,
                balanced_accuracy=metrics.balanced_accuracy,
                macro_f1=metrics.macro_f1,
                recall=dict(zip(classes, metrics.recall, strict=True)),
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
                batch_classes=dict(zip(classes, counts, strict=True)),
                notes=notes,
                initial=[] if index else [pool_data.ids[i] for i in labeled.tolist()],
            )
            labeled = torch.cat([labeled, batch])
    finally:
        if shards is not None:
            shards.close()


def _resume(inputs: RunInputs, history: Sequence[dict[str, Any]]) -> Tensor:
    """Return the pool positions that are labeled after ``history``."""
    ids = inputs.data.train.ids
    queried = [name for result in history for name in result["batch"]]
    positions = ids.positions(queried)
    if (positions < 0).any() or len(set(queried)) < len(queried):
        raise InputError("rounds.jsonl: holds an id that is not in the pool, or twice; remove the file to run again")
    initial = [ids[i] for i in inputs.initial.tolist()]
    if history and history[0].get("initial", initial) != initial:
        raise InputError("rounds.jsonl: has the initial set of another seed or pool; remove the file to run again")
    return torch.cat([inputs.initial, positions])


def _state_hash(model: nn.Module, labeled: Tensor) -> str:
    """Return a hash of the state that a query starts from: the trained model and the labeled set."""
    digest = hashlib.sha256(labeled.numpy().tobytes())
    for value in model.cpu().state_dict().values():
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


class StageClock:
    """A progress callback that forwards its calls and measures the duration of each stage."""

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
        """End the current stage and return the seconds of each stage."""
        now = time.perf_counter()
        if self.current:
            self.seconds[self.current] = self.seconds.get(self.current, 0.0) + now - self.since
        self.current, self.since = "", now
        return self.seconds


def validate_batch(batch: Tensor, candidates: Tensor, size: int) -> Tensor:
    """Return ``batch`` if it holds exactly ``size`` distinct candidates.

    Raises:
        RuntimeError: the strategy returned another value. Batches are never extended or truncated silently.
    """
    if not isinstance(batch, Tensor) or batch.dim() != 1 or batch.dtype not in INTEGERS:
        kind = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else short(batch)
        raise RuntimeError(
            f"the strategy returned {type(batch).__name__} {kind}; expected a list, a range, an array or a tensor [b] "
            "of integers"
        )
    batch = batch.cpu().long()
    if len(batch) != size or len(batch.unique()) != size or not torch.isin(batch, candidates).all():
        raise RuntimeError(
            f"the strategy returned {len(batch)} positions, {len(batch.unique())} distinct, "
            f"{int(torch.isin(batch, candidates).sum())} of them candidates; expected {size} distinct candidates"
        )
    return batch

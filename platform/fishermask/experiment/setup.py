"""What a run works on, made from its settings, with every check that can be made before anything is trained."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fishermask import strategies
from fishermask.config import DataConfig, EngineConfig, ExperimentConfig, Imbalance, NamedConfig
from fishermask.data import dataset, imbalance
from fishermask.data.dataset import Dataset
from fishermask.errors import InputError
from fishermask.experiment.streams import stream, stream_seed
from fishermask.guard import guarded, short
from fishermask.pool.plan import Plan, free_memory, plan, plan_prediction
from fishermask.pool.shard import BLOCK
from fishermask.strategies import Strategy
from fishermask.tensors import models
from fishermask.tensors.images import Statistics, channel_statistics, normalise
from fishermask.tensors.layout import SIZES
from fishermask.tensors.memory import Prediction, PredictionProbe, Probe, Workload
from fishermask.tensors.precision import Precision
from fishermask.tensors.slow_gradients import copy_model

TYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


SECONDS_A_SHARD = 10.0
"""Work of a query on one core that is worth a shard of its own ..."""
IMAGES_A_SHARD = 20_000
"""... and as many images, where a query is no work."""


@dataclass(frozen=True)
class Setup:
    """The pool, the test set and the strategy of one run."""

    config: ExperimentConfig
    data: Dataset
    """Training part: the pool after imbalance. Only the remaining classes."""
    initial: torch.Tensor
    """Pool positions that are labelled at the start, ascending."""
    statistics: Statistics
    strategy: Strategy
    work: Workload | Prediction | None = None
    """What a query computes; None where it looks at no image."""

    def model(self, round_index: int) -> nn.Module:
        """A fresh model for a round: the same for every strategy."""
        config = self.config
        seed = stream_seed(config.seed, "model", round_index)
        return models.build(config.model.name, config.model.params, self.data.image_shape, len(self.data.classes), seed)

    def example(self, count: int = 1) -> torch.Tensor:
        """Images spread over the pool, normalized: ``count`` of them, or all of a smaller pool."""
        some = torch.linspace(0, len(self.data.train.labels) - 1, count).long().unique()
        return normalise(self.data.train.images[some], self.statistics)

    def wanted_shards(self) -> int:
        """As many shards as give each some seconds of a query's work and fit, each, into the memory it may use."""
        size, memory = len(self.data.train.labels), self.config.resources.memory
        if self.work is None:
            return math.ceil(size / IMAGES_A_SHARD)
        blocks = math.ceil(size / BLOCK)  # more would be empty
        count = min(math.ceil(self._planned(1, math.inf).seconds / SECONDS_A_SHARD), blocks)
        if self.config.resources.workers == "ray" and memory is not None:
            while count < blocks and self._planned(count, math.inf).bytes > memory * 1e9:
                count = min(blocks, 2 * count)
        return max(1, count)

    def largest_query(self) -> int:
        """Images that a query buys, but for a last one that may buy fewer."""
        return min(self.config.budget.query, self.config.budget.total - self.config.budget.initial)

    def plan(self, shards: int) -> Plan | None:
        """How a query goes about it with this many shards.

        Raises:
            InputError: it does not fit into the memory there is.
        """
        memory = self.config.resources.memory
        return None if self.work is None else self._planned(shards, None if memory is None else memory * 1e9)

    def _planned(self, shards: int, memory: float | None) -> Plan:
        config, size = self.config, len(self.data.train.labels)
        assert self.work is not None
        probe = _probe(config.model, self.data.image_shape, len(self.data.classes), self.work)
        in_process = config.resources.workers == "in_process"
        gpu = (config.resources.gpus if in_process else config.resources.gpus_per_shard) > 0
        if isinstance(probe, PredictionProbe):
            return plan_prediction(probe, size, shards, in_process, memory, gpu)
        query = self.largest_query()
        labeled = config.budget.total - query  # before the last query
        return plan(probe, size, query, shards, in_process, precision(config.engine), memory, gpu, labeled)


def prepare(config: ExperimentConfig) -> Setup:
    """Load the data, draw the pool and the initial set, and check all settings against them.

    Raises:
        InputError: settings that cannot work; the message names the field and what would be right.
    """
    strategy = strategies.load(config.strategy)
    pool = (config.data, config.imbalance, config.seed)
    data = _pool(*pool)
    size = len(data.train.labels)
    if len(data.classes) < 2:
        raise InputError(
            f"data: all images belong to one class, {short(data.classes[0])}; a classifier needs two or more classes"
        )
    if not len(data.test.labels):
        raise InputError("data.test: holds no image of the pool's classes; give test images of each of them")
    for field in ("initial", "query", "total"):
        if (value := getattr(config.budget, field)) > size:
            raise InputError(f"budget.{field}: {value} exceeds the pool of {size} images; lower it")
    drawn = torch.randperm(size, generator=stream(config.seed, "initial"))
    if config.data.statistics == "published" and data.published is None:
        raise InputError(f"data.statistics: there are no published ones for {config.data.name}; use pool")
    own = config.data.statistics == "pool" or data.published is None
    statistics = _pool_statistics(*pool) if own or data.published is None else data.published
    setup = Setup(config, data, drawn[: config.budget.initial].sort().values, statistics, strategy)
    _check_size(config.model, data)
    images = setup.example(sum(SIZES))
    with guarded("model.name", f"{config.model.name} cannot be prepared for queries"):
        model = setup.model(0).eval()
        copy_model(model).requires_grad_(False)  # as shards do
    models.check_logits(model, images, config.model.name)
    # Verifying a model takes as long as some training steps, and does not depend on the seed: once is enough.
    strategy_alone = config.strategy.model_copy(update={"label": None})
    key = config.model, strategy_alone, config.data, data.image_shape, len(data.classes)
    if key not in _work:
        _work[key] = _checked_work(setup, model, images)
    return replace(setup, work=_work[key])


_work: dict[tuple[Any, ...], Workload | Prediction | None] = {}
"""What a query computes, by all that it depends on."""


def _checked_work(setup: Setup, model: nn.Module, images: torch.Tensor) -> Workload | Prediction | None:
    """What a query of ``setup`` computes with ``model``, which takes ``images``.

    Raises:
        InputError: the strategy does not go with the model.
    """
    problem = f"{setup.strategy.file} cannot work with the model {setup.config.model.name}"
    try:
        with guarded("strategy.name", problem):
            return setup.strategy.check(model, images)
    except InputError as error:
        message = str(error)
        if message.startswith(("model", "strategy")):
            raise
        raise InputError(f"strategy.params.{message}", error.details) from error.__cause__


def _check_size(model: NamedConfig, data: Dataset) -> None:
    """Raise ``InputError`` for a model that this machine cannot hold: to make it would end the process."""
    needed = models.parameter_bytes(model.name, model.params, data.image_shape, len(data.classes))
    if needed > (free := free_memory(gpu=False)):
        raise InputError(
            f"model.params: the parameters of {model.name} take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of "
            "memory are free; choose a smaller model"
        )


def precision(engine: EngineConfig) -> Precision:
    """The types that ``engine`` names."""
    autocast = None if engine.gradients == "float32" else TYPES[engine.gradients]
    return Precision(TYPES[engine.storage], TYPES[engine.scores], autocast, engine.channels_last)


# The same for all seeds and budgets of a model and strategy.
@lru_cache(maxsize=64)
def _probe(
    model: NamedConfig, shape: tuple[int, int, int], num_classes: int, work: Workload | Prediction
) -> Probe | PredictionProbe:
    network = models.build(model.name, model.params, shape, num_classes, seed=0).eval()
    image = torch.zeros(1, *shape)
    with guarded("model.name", f"the queries of {model.name} cannot be measured"):
        return _measure(network, image, work)


def _measure(network: nn.Module, image: torch.Tensor, work: Workload | Prediction) -> Probe | PredictionProbe:
    return Probe(network, image, work) if isinstance(work, Workload) else PredictionProbe(network, image, work)


# One run after another usually wants another seed's pool or the same again; its row numbers and labels are all that is
# kept in memory, so one is kept.
@lru_cache(maxsize=1)
def _pool(data: DataConfig, rule: Imbalance, seed: int) -> Dataset:
    """The data set after imbalance; the same for all strategies and budgets of a seed."""
    whole = dataset.load(data)
    rows, classes = imbalance.choose(whole.train.labels, len(whole.classes), rule, stream(seed, "imbalance"))
    return whole.restrict(rows, classes)


# A few numbers each, but every image is read for them.
@lru_cache(maxsize=1024)
def _pool_statistics(data: DataConfig, rule: Imbalance, seed: int) -> Statistics:
    return channel_statistics(_pool(data, rule, seed).train.images)

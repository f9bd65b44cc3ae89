"""What a run works on, made from its settings, with every check that can be made before anything is trained."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fishermask import query_strategies
from fishermask.config import DataConfig, ExperimentConfig, Imbalance, NamedConfig
from fishermask.data import dataset, imbalance
from fishermask.data.dataset import Dataset
from fishermask.errors import InputError
from fishermask.experiment.streams import stream, stream_seed
from fishermask.guard import guarded, short
from fishermask.learning import models
from fishermask.planning.measurement import Measurement, measure
from fishermask.planning.query_plan import free_memory
from fishermask.planning.workload import Workload
from fishermask.query_strategies import Strategy
from fishermask.tensors.images import Statistics, channel_statistics, normalize
from fishermask.tensors.layout import SIZES
from fishermask.tensors.slow_gradients import copy_model


@dataclass(frozen=True)
class Setup:
    """The pool, the test set and the strategy of one run."""

    config: ExperimentConfig
    data: Dataset
    """Training part: the pool after imbalance. Only the remaining classes."""
    initial: torch.Tensor
    """Pool positions that are labeled at the start, ascending."""
    statistics: Statistics
    strategy: Strategy

    def model(self, round_index: int) -> nn.Module:
        """Return a fresh model for a round: the same for every strategy."""
        config = self.config
        seed = stream_seed(config.seed, "model", round_index)
        return models.build(config.model.name, config.model.params, self.data.image_shape, len(self.data.classes), seed)

    def example(self, count: int = 1) -> torch.Tensor:
        """Return images spread over the pool, normalized: ``count`` of them, or all of a smaller pool."""
        positions = torch.linspace(0, len(self.data.train.labels) - 1, count).long().unique()
        return normalize(self.data.train.images[positions], self.statistics)


def load_setup(config: ExperimentConfig, statistics: Statistics | None = None) -> Setup:
    """Load the data, draw the pool and the initial set, and check the settings against them.

    Args:
        statistics: channel statistics where they are known already; no image is read then.

    Raises:
        InputError: settings that cannot work; the message names the field and what would be right.
    """
    strategy = query_strategies.load(config.strategy)
    data = _pool(config.data, config.imbalance, config.seed)
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
    if (shards := config.resources.shards) != "auto" and shards > size:
        raise InputError(f"resources.shards: {shards} exceeds the pool of {size} images; lower it")
    if config.data.statistics == "published" and data.published is None:
        raise InputError(f"data.statistics: no published statistics are known for {config.data.name}; use pool")
    if statistics is None:
        statistics = None if config.data.statistics == "pool" else data.published
        statistics = statistics or _pool_statistics(config.data, config.imbalance, config.seed)
    order = torch.randperm(size, generator=stream(config.seed, "initial"))
    return Setup(config, data, order[: config.budget.initial].sort().values, statistics, strategy)


def prepare(config: ExperimentConfig) -> Setup:
    """Load what a run works on, and check that its model and its strategy go together.

    Raises:
        InputError: settings that cannot work; the message names the field and what would be right.
    """
    setup = load_setup(config)
    check_model(setup)
    return setup


_workloads: dict[tuple[Any, ...], Workload | None] = {}
"""What a query computes, by all that it depends on."""


def check_model(setup: Setup) -> Workload | None:
    """Return what a query computes with the run's model; None if it looks at no image.

    Raises:
        InputError: the model cannot be made or used, or does not go with the strategy.
    """
    config, data = setup.config, setup.data
    needed = models.parameter_bytes(config.model.name, config.model.params, data.image_shape, len(data.classes))
    if needed > (free := free_memory(gpu=False)):  # to make such a model would end the process
        raise InputError(
            f"model.params: the parameters of {config.model.name} take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} "
            "GB of memory are free; choose a smaller model"
        )
    images = setup.example(sum(SIZES))
    with guarded("model.name", f"{config.model.name} cannot be prepared for queries"):
        model = setup.model(0).eval()
        copy_model(model).requires_grad_(False)  # as shards do
    models.check_logits(model, images, config.model.name)
    # Verifying a model takes as long as some training steps, and does not depend on the seed: once is enough.
    strategy = config.strategy.model_copy(update={"label": None})
    key = config.model, strategy, config.data, data.image_shape, len(data.classes)
    if key not in _workloads:
        _workloads[key] = _workload(setup, model, images)
    return _workloads[key]


def _workload(setup: Setup, model: nn.Module, images: torch.Tensor) -> Workload | None:
    problem = f"{setup.strategy.file} cannot work with the model {setup.config.model.name}"
    try:
        with guarded("strategy.name", problem):
            return setup.strategy.check(model, images)
    except InputError as error:
        message = str(error)
        if message.startswith(("model", "strategy")):
            raise
        raise InputError(f"strategy.params.{message}", error.details) from error.__cause__


# The same for all seeds and budgets of a model and strategy.
@lru_cache(maxsize=64)
def measure_model(
    model: NamedConfig, shape: tuple[int, int, int], num_classes: int, work: Workload | None
) -> Measurement:
    """Measure training and queries with a model of these settings, which takes images of ``shape``."""
    network = models.build(model.name, model.params, shape, num_classes, seed=0)
    with guarded("model.name", f"training and queries of {model.name} cannot be measured"):
        return measure(network, torch.zeros(1, *shape), work, training=True)


# Most runs use the pool of the run before, or another seed's; row numbers and labels are all that is kept in memory.
@lru_cache(maxsize=1)
def _pool(data: DataConfig, rule: Imbalance, seed: int) -> Dataset:
    """Return the data set after imbalance; the same for all strategies and budgets of a seed."""
    whole = dataset.load(data)
    rows, classes = imbalance.select_pool(whole.train.labels, len(whole.classes), rule, stream(seed, "imbalance"))
    return whole.restrict(rows, classes)


# A few numbers each, but every image is read for them.
@lru_cache(maxsize=1024)
def _pool_statistics(data: DataConfig, rule: Imbalance, seed: int) -> Statistics:
    return channel_statistics(_pool(data, rule, seed).train.images)

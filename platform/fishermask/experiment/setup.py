"""What a run works on, made from its settings, with every check that can be made before anything is trained."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from fishermask import strategies
from fishermask.config import DataConfig, EngineConfig, ExperimentConfig, Imbalance
from fishermask.data import dataset, imbalance
from fishermask.data.dataset import Dataset
from fishermask.errors import InputError
from fishermask.experiment.streams import stream, stream_seed
from fishermask.pool.plan import Plan, plan
from fishermask.strategies import Strategy
from fishermask.tensors import models
from fishermask.tensors.images import Statistics, channel_statistics, normalise
from fishermask.tensors.precision import Precision

TYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    plan: Plan | None = None
    """How a query goes about it, where the strategy says what it computes."""

    def model(self, round_index: int) -> nn.Module:
        """A fresh model for a round: the same for every strategy."""
        config = self.config
        seed = stream_seed(config.seed, "model", round_index)
        return models.build(config.model.name, config.model.params, self.data.image_shape, len(self.data.classes), seed)


def prepare(config: ExperimentConfig) -> Setup:
    """Load the data, draw the pool and the initial set, and check all settings against them.

    Raises:
        InputError: settings that cannot work; the message names the field and what would be right.
    """
    strategy = strategies.load(config.strategy)
    pool = (config.data, config.imbalance, config.seed)
    data = _pool(*pool)
    size = len(data.train.labels)
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
    return replace(setup, plan=_plan(setup))


def precision(engine: EngineConfig) -> Precision:
    """The types that ``engine`` names."""
    autocast = None if engine.gradients == "float32" else TYPES[engine.gradients]
    return Precision(TYPES[engine.storage], TYPES[engine.scores], autocast, engine.channels_last)


def _plan(setup: Setup) -> Plan | None:
    config, data = setup.config, setup.data
    model = setup.model(0).eval().requires_grad_(False)
    images = normalise(data.train.images[:2], setup.statistics)
    try:
        work = setup.strategy.check(model, images)
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith("model") else f"strategy.params.{message}") from None
    if work is None:
        return None
    resources = config.resources
    return plan(
        work,
        model,
        images[:1],
        len(data.train.labels),
        resources.shards,
        resources.workers == "in_process",
        precision(config.engine),
        None if resources.memory is None else resources.memory * 1e9,
    )


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

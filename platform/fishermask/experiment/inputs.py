"""The inputs of one run (pool, test set, initial set and strategy), and all checks before training."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fishermask import query_strategies
from fishermask.config import DataConfig, ExperimentConfig, Imbalance, NamedConfig
from fishermask.data.dataset import Dataset, load_dataset
from fishermask.data.imbalance import select_pool
from fishermask.errors import InputError
from fishermask.experiment.streams import stream, stream_seed
from fishermask.guard import guarded, short
from fishermask.learning import models
from fishermask.planning.placement import free_memory
from fishermask.planning.workload import Measurement, Workload, measure
from fishermask.query_strategies import Strategy
from fishermask.tensors.gradient_plan import VERIFICATION_SIZES
from fishermask.tensors.images import Statistics, channel_statistics, normalize
from fishermask.tensors.slow_gradients import copy_model

CACHED_POOLS = 16
"""Maximum number of pools in the cache. A pool takes 16 bytes per image if images are left out, otherwise nothing."""


@dataclass(frozen=True)
class RunInputs:
    """The pool, the test set, the initial labels and the strategy of one run."""

    config: ExperimentConfig
    data: Dataset
    """The pool and the test set after the imbalance is applied, with the remaining classes only."""
    initial: torch.Tensor
    """Pool positions that are labeled in round 0, ascending."""
    statistics: Statistics
    strategy: Strategy

    def build_model(self, round_index: int) -> nn.Module:
        """Return a newly initialized model for a round. Its weights are the same for every strategy."""
        config = self.config
        seed = stream_seed(config.seed, "model", round_index)
        return models.build(config.model.name, config.model.params, self.data.image_shape, len(self.data.classes), seed)

    def example_images(self, count: int = 1) -> torch.Tensor:
        """Return ``count`` normalized images, evenly spaced in the pool; all images of a smaller pool."""
        positions = torch.linspace(0, len(self.data.train.labels) - 1, count).long().unique()
        return normalize(self.data.train.images[positions], self.statistics)


def load_inputs(config: ExperimentConfig, statistics: Statistics) -> RunInputs:
    """Return the inputs of a run that has been checked, on any machine. No image is read.

    Args:
        statistics: channel statistics of the run's plan.
    """
    data = load_pool(config.data, config.imbalance, config.seed)
    order = torch.randperm(len(data.train.labels), generator=stream(config.seed, "initial"))
    initial = order[: config.budget.initial].sort().values
    return RunInputs(config, data, initial, statistics, query_strategies.load(config.strategy))


def prepare_inputs(config: ExperimentConfig) -> RunInputs:
    """Load the inputs of a run and check its settings against its data, its model and its strategy.

    Raises:
        InputError: a setting is invalid; the message names the setting and a remedy.
    """
    query_strategies.load(config.strategy)
    data = load_pool(config.data, config.imbalance, config.seed)
    _check_data(config, data)
    statistics = None if config.data.statistics == "pool" else data.published
    statistics = statistics or _pool_statistics(config.data, config.imbalance, config.seed)
    inputs = load_inputs(config, statistics)
    query_workload(inputs)
    return inputs


def _check_data(config: ExperimentConfig, data: Dataset) -> None:
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


_workloads: dict[tuple[Any, ...], Workload | None] = {}
"""Workload of a query, by all settings that it depends on."""


def query_workload(inputs: RunInputs) -> Workload | None:
    """Return the workload of a query with the run's model, or None if the strategy reads no image.

    The model is built and verified once for each model, data set and strategy: seed and budget do not matter.

    Raises:
        InputError: the model cannot be built or used, or does not go with the strategy.
    """
    config, data = inputs.config, inputs.data
    strategy = config.strategy.model_copy(update={"label": None})
    key = config.model, strategy, config.data, data.image_shape, len(data.classes)
    if key not in _workloads:
        _workloads[key] = _check_model(inputs)
    return _workloads[key]


def _check_model(inputs: RunInputs) -> Workload | None:
    model_config, data = inputs.config.model, inputs.data
    name = model_config.name
    required_bytes = models.parameter_bytes(name, model_config.params, data.image_shape, len(data.classes))
    if required_bytes > (free_bytes := free_memory()):  # building such a model would end the process
        raise InputError(
            f"model.params: the parameters of {name} take {required_bytes / 1e9:,.1f} GB, and {free_bytes / 1e9:,.1f} "
            "GB of memory are free; choose a smaller model"
        )
    images = inputs.example_images(sum(VERIFICATION_SIZES))
    with guarded("model.name", f"{name} cannot be prepared for queries"):
        model = inputs.build_model(0).eval()
        copy_model(model).requires_grad_(False)  # as shards do
    models.check_logits(model, images, name)
    try:
        with guarded("strategy.name", f"{inputs.strategy.file} cannot work with the model {name}"):
            return inputs.strategy.check(model, images)
    except InputError as error:
        message = str(error)
        if message.startswith(("model", "strategy")):
            raise
        raise InputError(f"strategy.params.{message}", error.details) from error.__cause__


# The result does not depend on seed and budget, so the runs of a sweep share it.
@lru_cache(maxsize=64)
def measure_model(
    model: NamedConfig, shape: tuple[int, int, int], num_classes: int, work: Workload | None
) -> Measurement:
    """Measure training and queries of a model that takes images of ``shape``."""
    network = models.build(model.name, model.params, shape, num_classes, seed=0)
    with guarded("model.name", f"{model.name} fails when it is trained"):
        return measure(network, torch.zeros(1, *shape), work)


@lru_cache(maxsize=CACHED_POOLS)
def load_pool(data: DataConfig, rule: Imbalance, seed: int) -> Dataset:
    """Return the data set after the imbalance is applied. All strategies and budgets of a seed share it."""
    source = load_dataset(data)
    rows, classes = select_pool(source.train.labels, len(source.classes), rule, stream(seed, "imbalance"))
    return source.restrict(rows, classes)


# An entry is small, but computing it reads every image of a pool.
@lru_cache(maxsize=1024)
def _pool_statistics(data: DataConfig, rule: Imbalance, seed: int) -> Statistics:
    return channel_statistics(load_pool(data, rule, seed).train.images)

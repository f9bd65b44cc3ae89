"""All that is decided about a run before it starts, once: what is displayed, reserved and computed follows from it."""

import math
from dataclasses import dataclass

import torch

from fishermask.config import EngineConfig, ExperimentConfig
from fishermask.experiment.setup import check_model, load_setup, measure_model
from fishermask.planning.measurement import Measurement
from fishermask.planning.memory import Task
from fishermask.planning.placement import Cluster, num_shards
from fishermask.planning.query_plan import (
    MEMORY_SHARE,
    PROCESS_BYTES,
    QueryPlan,
    free_memory,
    plan_query,
    wanted_shards,
)
from fishermask.tensors.images import Statistics
from fishermask.tensors.precision import Precision

TYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RunPlan:
    """A checked run, and how its queries are computed."""

    config: ExperimentConfig
    pool: str
    """The size of the pool, and what the imbalance leaves out of the data set, in one line."""
    statistics: Statistics
    measured: Measurement
    task: Task
    query: QueryPlan


def plan_run(config: ExperimentConfig, cluster: Cluster) -> RunPlan:
    """Check a run and plan its queries on the nodes of ``cluster``.

    Raises:
        InputError: settings that cannot work; the message names the field and what would be right.
    """
    setup = load_setup(config)
    measured = measure_model(config.model, setup.data.image_shape, len(setup.data.classes), check_model(setup))
    resources, in_process = config.resources, config.resources.workers == "in_process"
    batch = min(config.budget.query, config.budget.total - config.budget.initial)
    task = Task(
        pool_size=len(setup.data.train.labels),
        query_size=batch,
        num_labeled=config.budget.total - batch,  # before the last query
        precision=precision(config.engine),
        training_batch=config.training.batch_size if in_process or not resources.gpus else 0,
    )
    memory = cluster.largest("memory") if resources.memory is None else 1e9 * resources.memory
    limit = shard_limit = max(0.0, memory - PROCESS_BYTES)
    gpu = (resources.gpus if in_process else resources.gpus_per_shard) > 0
    if gpu and resources.memory is None:
        gpu_limit = MEMORY_SHARE * free_memory(gpu=True) if torch.cuda.is_available() else math.inf
        limit, shard_limit = (gpu_limit, gpu_limit) if in_process else (limit, gpu_limit)
    wanted = wanted_shards(measured, task, in_process, shard_limit) if resources.shards == "auto" else 1
    count = num_shards(resources, wanted, cluster)
    query = plan_query(measured, task, count, in_process=in_process, gpu=gpu, limit=limit, shard_limit=shard_limit)
    return RunPlan(config, setup.data.describe_pool(config.imbalance), setup.statistics, measured, task, query)


def precision(engine: EngineConfig) -> Precision:
    """Return the types that ``engine`` names."""
    autocast = None if engine.gradients == "float32" else TYPES[engine.gradients]
    return Precision(TYPES[engine.storage], TYPES[engine.scores], autocast, engine.channels_last)

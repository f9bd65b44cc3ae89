"""The plan of a run: made once, on the driver; the display, the reserved memory and the trial follow it."""

import math
from dataclasses import dataclass

import torch

from fishermask.config import EngineConfig, ExperimentConfig
from fishermask.errors import InputError
from fishermask.experiment.inputs import RunInputs, load_inputs, measure_model, prepare_inputs, query_workload
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
    """A run that has passed all checks, and the execution plan of its queries."""

    config: ExperimentConfig
    pool: str
    """The size of the pool, and what the imbalance leaves out of the data set, in one line."""
    statistics: Statistics
    measurement: Measurement
    task: Task
    query: QueryPlan

    def load_inputs(self) -> RunInputs:
        """Map the run's data on this machine. Nothing is checked, measured or computed again.

        Raises:
            InputError: the data on this machine differ from the driver's.
        """
        inputs = load_inputs(self.config, self.statistics)
        if (size := len(inputs.data.train.labels)) != self.task.pool_size:
            raise InputError(
                f"data: the pool has {size} images on this machine and {self.task.pool_size} on the driver's; copy the "
                "same files to every machine"
            )
        return inputs


def plan_run(config: ExperimentConfig, cluster: Cluster) -> RunPlan:
    """Check a run and plan its queries on the nodes of ``cluster``.

    Raises:
        InputError: settings that cannot work; the message names the field and a value that would.
    """
    inputs = prepare_inputs(config)
    data = inputs.data
    measurement = measure_model(config.model, data.image_shape, len(data.classes), query_workload(inputs))
    resources, in_process = config.resources, config.resources.workers == "in_process"
    batch = min(config.budget.query, config.budget.total - config.budget.initial)
    task = Task(
        pool_size=len(data.train.labels),
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
    wanted = wanted_shards(measurement, task, in_process, shard_limit) if resources.shards == "auto" else 1
    count = num_shards(resources, wanted, cluster)
    query = plan_query(measurement, task, count, in_process=in_process, gpu=gpu, limit=limit, shard_limit=shard_limit)
    return RunPlan(config, data.describe_pool(config.imbalance), inputs.statistics, measurement, task, query)


def precision(engine: EngineConfig) -> Precision:
    """Return the types that ``engine`` names."""
    autocast = None if engine.gradients == "float32" else TYPES[engine.gradients]
    return Precision(TYPES[engine.storage], TYPES[engine.scores], autocast, engine.channels_last)

"""The plan of a run. The driver makes it once; the display, the memory reservation and the trial use it."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fishermask.config import EngineConfig, ExperimentConfig
from fishermask.errors import InputError
from fishermask.experiment.inputs import RunInputs, load_inputs, measure_model, prepare_inputs, query_workload
from fishermask.planning.estimates import PROCESS_BYTES, QueryRequest, format_bytes
from fishermask.planning.placement import MEMORY_SHARE, Cluster, free_gpu_memory, num_shards
from fishermask.planning.query_plan import QueryPlan, plan_query, useful_shards
from fishermask.planning.workload import Measurement
from fishermask.tensors.images import Statistics
from fishermask.tensors.precision import Precision

TYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RunPlan:
    """A run that has passed all checks, and the execution plan of its queries."""

    config: ExperimentConfig
    pool: list[str]
    """Lines on the pool: its size, the images that the imbalance leaves out, and classes without test images."""
    hashes: dict[str, str]
    """Hash of the training and of the test images on the driver."""
    statistics: Statistics
    measurement: Measurement
    request: QueryRequest
    query: QueryPlan

    def load_inputs(self) -> RunInputs:
        """Return the run's inputs on this machine, without repeating checks and measurements.

        Raises:
            InputError: the data on this machine differ from the driver's.
        """
        inputs = load_inputs(self.config, self.statistics)
        for split in self.hashes:
            if inputs.data.hashes[split] != self.hashes[split]:
                raise InputError(
                    f"data.{split}: the decoded images or their labels on {socket.gethostname()} differ from those on "
                    "the driver's machine; use the same files and the same packages on every machine"
                )
        return inputs


def plan_run(config: ExperimentConfig, cluster: Cluster) -> RunPlan:
    """Check a run and plan its queries on the nodes of ``cluster``.

    Raises:
        InputError: a setting is invalid; the message names the setting and a remedy.
    """
    inputs = prepare_inputs(config)
    data = inputs.data
    measurement = measure_model(config.model, data.image_shape, len(data.classes), query_workload(inputs))
    resources, in_process = config.resources, config.resources.workers == "in_process"
    batch_size = min(config.budget.query, config.budget.total - config.budget.initial)
    request = QueryRequest(
        pool_size=len(data.train.labels),
        batch_size=batch_size,
        num_labeled=config.budget.total - batch_size,  # before the last query
        precision=precision(config.engine),
        training_batch_size=config.training.batch_size if in_process or not resources.gpus else 0,
    )
    memory = cluster.largest("memory") if resources.memory is None else 1e9 * resources.memory
    limit, gpu_limit = memory - PROCESS_BYTES, None
    if resources.gpus if in_process else resources.gpus_per_shard:
        gpu_limit = MEMORY_SHARE * free_gpu_memory()
    count = 1
    if resources.shards == "auto":
        count = useful_shards(measurement, request, in_process=in_process, limit=limit, gpu_limit=gpu_limit)
    count = num_shards(resources, count, cluster)
    plan = partial(plan_query, measurement, request, count, in_process=in_process, gpu_limit=gpu_limit)
    try:
        if limit <= 0:
            raise InputError(
                f"resources.memory: a process takes {format_bytes(PROCESS_BYTES)} before it computes, and only "
                f"{format_bytes(memory)} are available; use nodes with more memory"
            )
        query = plan(limit=limit)
    except InputError as error:
        if resources.memory is None or not (value := _smallest_memory(plan, cluster.largest("memory"))):
            raise
        problem, _, remedy = str(error).rpartition("; ")
        remedy = f"raise resources.memory from {resources.memory:g} to {value}, or {remedy}"
        raise InputError(f"{problem}; {remedy}") from None
    pool = data.describe_pool(config.imbalance)
    return RunPlan(config, pool, data.hashes, inputs.statistics, measurement, request, query)


def _smallest_memory(plan: Callable[..., QueryPlan], largest: float) -> float | None:
    """Return the smallest ``resources.memory``, in steps of 0.01 GB, with which ``plan`` raises no error.

    Args:
        largest: bytes of the largest node. If they are too few, return None.
    """

    def fits(value: float) -> bool:
        try:
            plan(limit=1e9 * value - PROCESS_BYTES)
        except InputError:
            return False
        return True

    low, high = 0, int(largest / 1e7)
    if not fits(high / 100):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle / 100) else (middle, high)
    return high / 100


def precision(engine: EngineConfig) -> Precision:
    """Return the PyTorch types that ``engine`` names."""
    autocast = None if engine.gradients == "float32" else TYPES[engine.gradients]
    return Precision(TYPES[engine.storage], TYPES[engine.scores], autocast, engine.channels_last)

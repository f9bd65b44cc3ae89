"""One query with the user's own model and pool."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fishermask import query_strategies
from fishermask.api.progress import reporter
from fishermask.api.samples import (
    ModelInputs,
    NotFiniteError,
    Transform,
    as_samples,
    first_not_finite,
    read_repeatedly,
)
from fishermask.api.selection import Selection
from fishermask.config import MAX_SEED, MAX_SHARDS, EngineConfig, StrategyConfig, StrategyParams, parse
from fishermask.errors import InputError
from fishermask.experiment.loop import StageClock, validate_batch
from fishermask.experiment.run_plan import precision
from fishermask.experiment.streams import stream
from fishermask.guard import guarded, short
from fishermask.planning.estimates import QueryRequest
from fishermask.planning.placement import MEMORY_SHARE, free_gpu_memory, free_memory
from fishermask.planning.query_plan import QueryPlan, plan_query
from fishermask.planning.workload import LiveBytes, measure
from fishermask.pool.pool import Engine, Pool, Progress
from fishermask.pool.shards import LocalShards
from fishermask.query_strategies import Query, Strategy
from fishermask.tensors.gradient_plan import VERIFICATION_SIZES, GradientPlan
from fishermask.tensors.images import Images
from fishermask.tensors.slow_gradients import copy_model
from fishermask.tensors.verification import check_logits, refuse_references
from fishermask.user_modules import absolute_file_name


def select(
    model: nn.Module,
    pool: "Tensor | np.ndarray | Dataset[Any] | Sequence[Any]",
    labeled: "Sequence[int] | np.ndarray | Tensor",
    budget: int,
    strategy: str | Query = "fisher_mask",
    *,
    params: Mapping[str, Any] | StrategyParams | None = None,
    labels: "Sequence[int] | np.ndarray | Tensor | None" = None,
    transform: Transform | None = None,
    seed: int = 0,
    shards: int = 1,
    memory: float | None = None,
    engine: Mapping[str, Any] | None = None,
    progress: bool | Callable[[str, int, int], object] | None = None,
) -> Selection:
    """Select the samples of a pool to label next.

    The result depends neither on ``shards`` nor on ``memory``. It is the batch that round 0 of a run with the same
    ``seed`` queries for the same model, pool and labeled positions. The query works on a copy of the model in eval
    mode, on the model's device. It does not change the model, the pool or the global random states.

    Args:
        model: a trained classifier, which returns logits [b, C] for a batch of inputs. Parameters with
            ``requires_grad=False`` are frozen: their gradients are not used.
        pool: all samples, including the labeled samples: a tensor or an array [n, ...], or a map-style data set with
            items x or (x, y, ...), which is read in batches. Floating-point samples of any shape are converted to the
            model's dtype; samples of any other dtype need ``transform``.
        labeled: positions that are labeled, or a boolean mask [n].
        budget: number of unlabeled positions to select.
        strategy: a name that ``strategies()`` lists, the path ``./FILE.py`` of a file with a function ``query``, or a
            function ``(pool, budget)`` or ``(pool, budget, params)`` that takes a ``Pool`` and returns positions.
        params: parameters of the strategy, by name. If ``strategy`` is a function, they are passed unchanged.
        labels: classes of the labeled positions, in the order of ``labeled``, for a strategy that reads
            ``pool.labels``; -1 by default.
        transform: makes the model's inputs [b, ...] from samples [b, ...], independently for each sample and without
            random augmentation, such as ``lambda batch: batch.float() / 255``.
        seed: seed of the strategy's random draws.
        shards: number of parts of the pool that are processed at the same time, each on one core.
        memory: GB of memory that the query may use; 90 % of the free memory by default.
        engine: number types, as in the section ``engine`` of a sweep file, such as ``{"storage": "bfloat16"}``.
        progress: True for a progress bar, or a function ``(stage, done, total)``.

    Returns:
        The selected positions in the order of choice, with the gain of each.

    Raises:
        InputError: an argument is invalid; the message names the argument and a remedy.
    """
    device, dtype = _get_device_and_dtype(model)
    with ExitStack() as stack:
        # The caller may have disabled gradients or set a default device.
        for context in (torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"), _rename_settings()):
            stack.enter_context(context)
        stack.enter_context(_restore_random_states(device))
        report = stack.enter_context(reporter(progress))
        samples = as_samples(pool)
        inputs = ModelInputs(samples, transform)
        positions = _parse_labeled(labeled, len(samples))
        if len(positions) == len(samples):
            raise InputError("labeled: holds all positions of the pool; no unlabeled sample is left to select")
        _require_integer("budget", budget, 1, len(samples) - len(positions), "the number of unlabeled samples")
        _require_integer("shards", shards, 1, min(len(samples), MAX_SHARDS), "the largest number for this pool")
        _require_integer("seed", seed, 0, MAX_SEED, "the largest seed")
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, Real) or not memory > 0):
            raise InputError(f"memory: is {short(memory)}; expected a number of GB above 0")
        classes = _parse_labels(labels, len(positions))
        engine_config = parse(EngineConfig, {} if engine is None else _plain(engine), "engine")
        query_strategy, name = _load_strategy(strategy, params)
        with guarded("model", "cannot be copied"):
            trained = copy_model(model).cpu().eval()
        request = QueryRequest(len(samples), budget, len(positions), precision(engine_config))
        clock = StageClock(report)
        local_shards = LocalShards(samples, inputs, shards, str(device))
        try:
            plan, gradient_plan = _plan_query(
                model, trained, samples, inputs, classes, query_strategy, request, shards, memory, device, clock
            )
            pool_view = Pool(
                local_shards,
                len(samples),
                positions,
                classes,
                trained,
                stream(seed, f"strategy {name}"),
                stream(seed, "fisher sample"),
                clock,
                Engine(request.precision, engine_config.drift, plan.chunk, plan.diagonal_batch),
                gradient_plan,
            )
            candidates = pool_view.candidates.clone()  # the strategy may write to the attributes of the pool
            batch = query_strategy.query(pool_view, budget)
        except NotFiniteError:
            position = first_not_finite(samples, inputs, dtype)
            raise InputError(
                f"pool: the input made from sample {position} holds NaN or infinity; correct or remove the sample"
            ) from None
        except FloatingPointError as error:
            raise InputError(_rephrase_numerical_error(str(error))) from error
        except RuntimeError as error:
            if isinstance(error.__cause__, SystemExit):
                raise InputError(f"strategy: {name} exits the process; raise an exception instead") from error
            raise
        finally:
            local_shards.close()
        try:
            batch = validate_batch(batch, candidates, budget)
        except RuntimeError as error:
            raise InputError(f"strategy: {error}") from None
        before, after = pool_view.objective or (None, None)
        return Selection(batch, pool_view.gains, before, after, name, dict(pool_view.notes), clock.finish())


def _get_device_and_dtype(model: object) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype of a model.

    Raises:
        InputError: ``model`` is not a model with parameters, or its parameters are on several devices.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: is {type(model).__name__}; expected a torch.nn.Module")
    parameters = list(model.parameters())
    if not parameters:
        raise InputError(f"model: {type(model).__name__} has no parameters; give a trained classifier")
    devices = sorted({str(value.device) for value in [*parameters, *model.buffers()]})
    if len(devices) > 1 or devices == ["meta"]:
        raise InputError(f"model: has parameters on {' and '.join(devices)}; move it to one device")
    return torch.device(devices[0]), parameters[0].dtype


def _parse_labeled(labeled: object, size: int) -> Tensor:
    """Return the labeled positions, [l], from positions or from a mask [size]."""
    if labeled is None or isinstance(labeled, str | bytes | Mapping | np.ma.MaskedArray):
        raise InputError(f"labeled: is {short(labeled)}; expected positions [l] or a boolean mask [n], [] for no label")
    with guarded("labeled", "is not a list of positions"):
        if not isinstance(labeled, Tensor | np.ndarray):
            items = list(labeled)  # type: ignore[call-overload]
            if len({isinstance(item, bool | np.bool_) for item in items}) > 1:
                raise TypeError("positions and booleans are mixed")
            labeled = items
        values = _as_tensor(labeled)
    if values.dtype == torch.bool:
        if values.shape != (size,):
            raise InputError(f"labeled: the mask has shape {tuple(values.shape)}; expected ({size},), as the pool has")
        return values.nonzero()[:, 0]
    if values.dim() != 1 or (len(values) and (values.is_floating_point() or values.is_complex())):
        raise InputError(
            f"labeled: is {values.dtype} of shape {tuple(values.shape)}; expected positions [l] or a boolean mask [n]"
        )
    values = values.long()
    if len(invalid := values[(values < 0) | (values >= size)]):
        raise InputError(f"labeled: holds position {invalid[0]}; the positions of the pool are 0 to {size - 1}")
    unique, counts = values.unique(return_counts=True)
    if len(unique) < len(values):
        raise InputError(f"labeled: holds position {unique[counts.argmax()]} more than once; list each position once")
    return values


def _parse_labels(labels: object, count: int) -> Tensor:
    """Return the classes of the labeled positions, [count]; -1 if they are not given."""
    if labels is None:
        return torch.full((count,), -1)
    with guarded("labels", "is not a list of classes"):
        values = _as_tensor(labels)
    if values.shape != (count,) or (count and (values.is_floating_point() or values.is_complex())):
        raise InputError(
            f"labels: is {values.dtype} of shape {tuple(values.shape)}; expected {count} integers, one for each "
            "labeled position"
        )
    if (values < 0).any():
        raise InputError(f"labels: holds class {values.min()}; expected classes from 0")
    return values.long()


def _as_tensor(values: object) -> Tensor:
    tensor = torch.as_tensor(values)
    if tensor.layout != torch.strided:
        raise TypeError("a sparse tensor")
    return tensor.cpu()


def _require_integer(name: str, value: object, smallest: int, largest: int, bound: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"{name}: is {short(value)}; expected an integer")
    if not smallest <= value <= largest:
        raise InputError(f"{name}: is {value}; expected {smallest} to {largest}, {bound}")


def _load_strategy(strategy: object, params: object) -> tuple[Strategy, str]:
    """Return a strategy with its parameters, and its name."""
    if callable(strategy):
        function = query_strategies.from_function(strategy, params)
        return function, function.file
    if not isinstance(strategy, str):
        raise InputError(f"strategy: is {short(strategy)}; expected a name, or a function (pool, budget)")
    if isinstance(params, StrategyParams):
        params = params.model_dump(exclude_unset=True)
    if not isinstance(params, Mapping | None):
        raise InputError(f"params: is {short(params)}; expected a dictionary")
    name = absolute_file_name(strategy, Path.cwd())
    config = parse(StrategyConfig, {"name": name, "params": _plain(params or {})}, "strategy")
    return query_strategies.load(config), config.short_name


def _plain(settings: object) -> object:
    """Return a dictionary of ``settings`` with Python numbers for NumPy's; other values are returned unchanged."""
    if not isinstance(settings, Mapping):
        return settings
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in settings.items()}


def _plan_query(
    original: nn.Module,
    model: nn.Module,
    samples: Images,
    inputs: ModelInputs,
    classes: Tensor,
    strategy: Strategy,
    request: QueryRequest,
    shards: int,
    memory: float | None,
    device: torch.device,
    progress: Progress,
) -> tuple[QueryPlan, GradientPlan | None]:
    """Check that ``model``, a copy of ``original``, takes the samples. Return the plans of the query and of gradients.

    Raises:
        InputError: the model, the transform and the strategy do not work together, or the query does not fit in memory.
    """
    dtype = next(model.parameters()).dtype
    positions = torch.linspace(0, len(samples) - 1, sum(VERIFICATION_SIZES)).long().unique()
    progress("check inputs", 0, 1)
    stored = read_repeatedly(samples, positions)
    examples = inputs.check(stored, dtype)
    with guarded("model", f"fails for inputs of shape {tuple(examples.shape)}"), torch.no_grad():
        refuse_references(original, model, examples)
        logits = model(examples.clone())
    check_logits(model, logits, len(examples))
    if (classes >= logits.shape[1]).any():
        raise InputError(
            f"labels: holds class {classes.max()}; the classes of the model are 0 to {logits.shape[1] - 1}"
        )
    problem = f"{strategy.file} cannot work with this model"
    progress("check gradients", 0, 1)
    with guarded("strategy", problem):
        try:
            with LiveBytes() as counter:
                work = strategy.check(model, examples)
        except InputError as error:
            text = str(error)
            raise InputError(text if text.startswith(("model", "strategy")) else f"params.{text}") from error
    progress("measure memory", 0, 1)
    with guarded("strategy", problem):
        measured = measure(
            model,
            examples,
            work,
            stored_bytes=stored[0].nbytes,
            training=False,
            seconds=False,
            verification_bytes=counter.peak,
        )
    limit = MEMORY_SHARE * free_memory() if memory is None else 1e9 * memory
    gpu_limit = MEMORY_SHARE * free_gpu_memory() if device.type == "cuda" else None
    query_plan = plan_query(measured, request, shards, limit=limit, gpu_limit=gpu_limit)
    return query_plan, measured.work.gradient_plan


@contextmanager
def _rename_settings() -> Iterator[None]:
    """Replace the names of settings in messages by the names of the arguments of ``select``."""
    try:
        yield
    except InputError as error:
        text = str(error)
        for setting, argument in (("strategy.params", "params"), ("strategy.name", "strategy"), ("resources.", "")):
            text = text.replace(setting, argument)
        if text != str(error):
            raise InputError(text, error.details) from error.__cause__
        raise


def _rephrase_numerical_error(message: str) -> str:
    """Return the message of a failed computation as an error of an argument."""
    if message.startswith(("strategy.", "engine.")):
        return message
    return f"model: {message.replace('lower training.learning_rate', 'check its parameters and inputs')}"


@contextmanager
def _restore_random_states(device: torch.device) -> Iterator[None]:
    """Restore the global random states of Python, NumPy and PyTorch, because data sets and models may use them."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

"""The query strategies. The file ``NAME.py`` in this package is the strategy ``NAME``; no registry is needed.

A strategy is a module with

* a docstring, whose first line says which samples the strategy chooses, and where the strategy was published;
* ``query(pool, budget, params)`` or ``query(pool, budget)``: returns the positions of ``budget`` distinct candidates in
  the order of choice, as a tensor, a NumPy array, a list or a range of integers;
* ``class Params(StrategyParams)``, if the strategy has parameters;
* ``check(params, model, images)``, if a query does more than predict the pool, or if some models are not supported. It
  raises ``InputError`` if the model or the parameters are not supported. It returns the workload, from which memory and
  time are estimated: ``Workload(gradient_plan, ...)`` if a query embeds the pool, ``Workload()`` if it only predicts
  the pool (the default without ``check``), or None if it reads no sample.

Settings name a strategy in one of three ways:

* ``NAME``: a file of this package.
* ``NAME``: an entry point of an installed package in the group ``fishermask.strategies`` that refers to such a module.
* ``./FILE.py``: a file beside the sweep file; ``./FILE.py:FUNCTION`` if its function is not called ``query``.

``fishermask.select`` also takes a function.
"""

import inspect
import pkgutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fishermask.config import Config, StrategyConfig, StrategyParams, parse
from fishermask.errors import InputError
from fishermask.guard import guarded, one_line, short
from fishermask.planning.workload import Workload
from fishermask.pool.pool import Pool
from fishermask.user_modules import attribute_of, import_file, split_file_name

GROUP = "fishermask.strategies"
"""Group of entry points with which installed packages add strategies."""

Query = Callable[..., Any]
"""``query(pool, budget)`` or ``query(pool, budget, params)``."""
Check = Callable[[Any, nn.Module, Tensor], Workload | None]
"""``check(params, model, images)``."""


@dataclass(frozen=True)
class Strategy:
    """A strategy with its parameters."""

    file: str
    """Name of the file or of the function in messages."""
    query_function: Query
    check_function: Check | None
    params: Any

    def query(self, pool: Pool, budget: int) -> Tensor:
        """Return the positions of ``budget`` candidates, in the order of choice.

        Raises:
            RuntimeError: the strategy tried to exit, which would end the process of the run.
        """
        arguments = (pool, budget, self.params)[: _num_arguments(self.query_function)]
        try:
            positions = self.query_function(*arguments)
        except SystemExit as error:
            raise RuntimeError(f"the strategy raises SystemExit (status {error.code})") from error
        return torch.from_numpy(np.array(positions)) if _holds_integers(positions) else positions

    def check(self, model: nn.Module, images: Tensor) -> Workload | None:
        """Return the workload of a query with ``model`` for inputs ``images`` [n, ...]; None if it reads no sample.

        Raises:
            InputError: the parameters do not suit the model.
        """
        if self.check_function is None:
            return Workload()
        workload = self.check_function(self.params, model, images)
        if not isinstance(workload, Workload | None):
            raise InputError(f"strategy.name: {self.file} check returns {short(workload)}; return a Workload or None")
        return workload


def available() -> list[str]:
    """Return the names of all strategies of this package and of installed packages."""
    return sorted({*_bundled(), *(point.name for point in entry_points(group=GROUP))})


def describe(name: str) -> tuple[str, type[Config]]:
    """Return the first line of a strategy's docstring, and the class of its parameters."""
    module, _ = _import(name)
    return (module.__doc__ or "").strip().split("\n")[0], _params_class(module)


def load(config: StrategyConfig) -> Strategy:
    """Return the strategy that ``config`` names, with its parameters.

    Raises:
        InputError: the strategy does not exist, or does not have these parameters.
    """
    parts = split_file_name(config.name)
    if parts is None and config.name not in _bundled() and config.name not in available():
        raise InputError(
            f"strategy.name: unknown strategy {short(config.name)}; there are {', '.join(available())}, and "
            "./FILE.py for a file beside the sweep file"
        )
    module, file = _import(config.name)
    function = attribute_of(module, (parts[1] if parts else None) or "query", f"strategy.name: {file}")
    params = parse(_params_class(module), config.params, "strategy.params", config.short_name)
    assert callable(function)
    return Strategy(file, function, getattr(module, "check", None), params)


def from_function(function: Query, params: Any = None) -> Strategy:
    """Return the strategy that calls ``function(pool, budget)`` or ``function(pool, budget, params)``.

    Raises:
        InputError: the function takes other arguments, or takes no ``params`` and some are given.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if not _is_query(function):
        raise InputError(f"strategy: {_describe_parameters(name, function)}")
    if _num_arguments(function) == 2 and params:
        raise InputError(f"params: {name} takes no params; give it a third argument, or leave params out")
    return Strategy(name, function, None, {} if params is None else params)


def _bundled() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)}


def _import(name: str) -> tuple[ModuleType, str]:
    """Return the module of a strategy, and the name of its file in messages."""
    function = "query"
    if (parts := split_file_name(name)) is not None:
        path, attribute = parts
        file, function = str(path), attribute or function
        module = import_file(path, "strategy.name")
    else:
        file = f"strategies/{name}.py"
        point = None if name in _bundled() else _entry_point(name)
        if point is not None:
            file = f"{point.value} (of {point.dist.name if point.dist else 'an installed package'})"
        with guarded(f"strategy.name: {file}", "cannot be imported"):
            module = import_module(f"{__name__}.{name}") if point is None else point.load()
    params = getattr(module, "Params", StrategyParams)
    query = getattr(module, function, None)
    if callable(query) and not _is_query(query):
        raise InputError(f"strategy.name: {file}: {_describe_parameters(function, query)}")
    if not callable(query) or not (isinstance(params, type) and issubclass(params, Config)):
        raise InputError(
            f"strategy.name: {file}: needs a function {function}(pool, budget, params); its Params, if any, must be a "
            "class that derives from fishermask.StrategyParams"
        )
    return module, file


def _entry_point(name: str) -> EntryPoint:
    return next(point for point in entry_points(group=GROUP) if point.name == name)


def _params_class(module: ModuleType) -> type[Config]:
    params: type[Config] = getattr(module, "Params", StrategyParams)
    return params


def _is_query(function: Query) -> bool:
    """Return whether ``function`` takes (pool, budget) or (pool, budget, params), and is not a model factory."""
    if not _num_arguments(function):
        return False
    names = list(inspect.signature(function).parameters.values())[:2]
    return not any(p.name == "num_classes" for p in names) and names[-1].default is names[-1].empty


def _describe_parameters(name: str, function: Query) -> str:
    problem = "has no signature"
    with suppress(ValueError):  # functions in C
        problem = f"takes {one_line(str(inspect.signature(function)))}"
    return (
        f"{name} {problem}; expected a function (pool, budget) or (pool, budget, params), without a default of budget"
    )


def _num_arguments(function: Callable[..., Any]) -> int:
    """Return how many of (pool, budget, params) ``function`` takes by position; 0 if it takes other arguments."""
    for count in (3, 2):
        with suppress(TypeError, ValueError):
            inspect.signature(function).bind(*range(count))
            return count
    return 0


def _holds_integers(positions: object) -> bool:
    if isinstance(positions, np.ndarray):
        return np.issubdtype(positions.dtype, np.integer)
    return isinstance(positions, list | tuple | range) and all(isinstance(p, int | np.integer) for p in positions)

"""One strategy a file. A file ``strategies/NAME.py`` is the strategy ``NAME``; there is no list to add it to.

A strategy file holds

* a docstring whose first line says what it chooses, and where it is published;
* ``query(pool, budget, params)``: the positions of ``budget`` distinct candidates, as an integer tensor;
* if it has parameters, ``class Params(Config)``;
* if it does more than to look at predictions, or some parameters do not go with some models,
  ``check(params, model, images)``, which raises ``InputError`` and returns what memory and time are estimated from: the
  ``embedding_workload`` of a query that embeds the pool; ``prediction_workload`` of one that only predicts it, which is
  what a strategy without ``check`` is taken for; None if no image is looked at.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from torch import Tensor, nn

from fishermask.config import Config, StrategyConfig, parse
from fishermask.errors import InputError
from fishermask.guard import guarded, short
from fishermask.planning.workload import Workload, prediction_workload
from fishermask.pool.pool import Pool


@dataclass(frozen=True)
class Strategy:
    """A strategy with its parameters."""

    module: ModuleType
    params: Config

    def query(self, pool: Pool, budget: int) -> Tensor:
        """Positions of ``budget`` candidates, in the order of choice.

        Raises:
            RuntimeError: the strategy tried to exit, which would take the process of the run with it.
        """
        try:
            return self.module.query(pool, budget, self.params)
        except SystemExit as error:
            raise RuntimeError(f"the strategy raises SystemExit (status {error.code})") from error

    def check(self, model: nn.Module, images: Tensor) -> Workload | None:
        """What a query computes with ``model``, which takes ``images`` [n, ...]; None if it looks at no image.

        Raises:
            InputError: the parameters do not go with the model.
        """
        check: Callable[[Config, nn.Module, Tensor], Workload | None] | None
        check = getattr(self.module, "check", None)
        work = prediction_workload(model, images) if check is None else check(self.params, model, images)
        if not isinstance(work, Workload | None):
            raise InputError(f"strategy.name: {self.file} check returns {short(work)}; expected a Workload or None")
        return work

    @property
    def file(self) -> str:
        """The file as messages name it."""
        return f"strategies/{self.module.__name__.rpartition('.')[2]}.py"


def available() -> list[str]:
    """Names of all strategies."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def describe(name: str) -> tuple[str, type[Config]]:
    """First line of a strategy's docstring, and the class of its parameters."""
    module = _module(name)
    return (module.__doc__ or "").split("\n")[0], getattr(module, "Params", Config)


def load(config: StrategyConfig) -> Strategy:
    """Find a strategy and check its parameters.

    Raises:
        InputError: there is no such strategy, or it has no such parameters.
    """
    if config.name not in available():
        raise InputError(f"strategy.name: unknown strategy {short(config.name)}; there are {', '.join(available())}")
    module = _module(config.name)
    return Strategy(module, parse(getattr(module, "Params", Config), config.params, "strategy.params"))


def _module(name: str) -> ModuleType:
    file = f"strategies/{name}.py"
    with guarded(f"strategy.name: {file}", "cannot be imported"):
        module = import_module(f"{__name__}.{name}")
    params = getattr(module, "Params", Config)
    if not callable(getattr(module, "query", None)) or not (isinstance(params, type) and issubclass(params, Config)):
        raise InputError(f"strategy.name: {file}: needs a function query(pool, budget, params), and Params a Config")
    return module

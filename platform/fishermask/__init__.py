"""Distributed batch active learning with Fisher information."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fishermask.config import StrategyParams
    from fishermask.errors import InputError
    from fishermask.pool.pool import Pool

__version__ = "0.1.0"
__all__ = ["InputError", "Pool", "StrategyParams"]

_MODULES = {
    "InputError": "fishermask.errors",
    "Pool": "fishermask.pool.pool",
    "StrategyParams": "fishermask.config",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: PyTorch, pandas and Ray take seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module 'fishermask' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

"""Distributed batch active learning with Fisher information.

The names below are the public API; all other names in the package are private and may change in any release.

```python
import torch
import fishermask

model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))  # trained elsewhere
pool = torch.randn(1000, 8)
selection = fishermask.select(model, pool, labeled=[3, 14, 159], budget=20)
print(selection.positions)  # label these samples next
```

* `select` chooses the samples of a pool to label next, for a trained model.
* `run` and `sweep` compare strategies in whole experiments; `read_results` reads their tables.
* `strategies` lists the strategies. Your own strategy is a function or a file; see `Pool` and `StrategyParams`.
* `InputError` is raised if an argument, a setting or a file is invalid. Its message has one line for each mistake,
  which names a remedy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fishermask.api.catalog import StrategyInfo, strategies
    from fishermask.api.select import select
    from fishermask.api.selection import Selection
    from fishermask.api.sweeps import Config, Results, read_results, run, sweep
    from fishermask.config import StrategyParams
    from fishermask.errors import InputError
    from fishermask.pool.pool import Pool

__version__ = "0.1.0"
__all__ = [
    "select",
    "Selection",
    "run",
    "sweep",
    "Config",
    "Results",
    "read_results",
    "strategies",
    "StrategyInfo",
    "Pool",
    "StrategyParams",
    "InputError",
]

_MODULES = {
    "Config": "fishermask.api.sweeps",
    "InputError": "fishermask.errors",
    "Pool": "fishermask.pool.pool",
    "Results": "fishermask.api.sweeps",
    "Selection": "fishermask.api.selection",
    "StrategyInfo": "fishermask.api.catalog",
    "StrategyParams": "fishermask.config",
    "read_results": "fishermask.api.sweeps",
    "run": "fishermask.api.sweeps",
    "select": "fishermask.api.select",
    "strategies": "fishermask.api.catalog",
    "sweep": "fishermask.api.sweeps",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, because PyTorch, pandas and Ray take seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module 'fishermask' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

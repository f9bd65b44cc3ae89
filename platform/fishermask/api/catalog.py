"""The query strategies that settings can select by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fishermask import query_strategies


@dataclass(frozen=True)
class StrategyInfo:
    """A query strategy.

    Attributes:
        description: which samples the strategy selects, and where it was published.
        params: the default of each parameter, by name.
        param_descriptions: what each parameter means, by name; empty for a parameter without a description.
    """

    description: str
    params: Mapping[str, Any]
    param_descriptions: Mapping[str, str]


def strategies() -> dict[str, StrategyInfo]:
    """Return all query strategies by name: those of fishermask and those of installed packages.

    Raises:
        InputError: the module of an installed package cannot be imported.
    """
    described = {name: query_strategies.describe(name) for name in query_strategies.available()}
    return {
        name: StrategyInfo(
            description,
            {key: field.get_default(call_default_factory=True) for key, field in params.model_fields.items()},
            {key: field.description or "" for key, field in params.model_fields.items()},
        )
        for name, (description, params) in described.items()
    }

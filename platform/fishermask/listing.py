"""Text about the settings, data sets, models and strategies that a sweep file can name."""

import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic_core import PydanticUndefined

from fishermask import query_strategies
from fishermask.config import IMBALANCES, Config, ExperimentConfig
from fishermask.data import sources
from fishermask.learning import models
from fishermask.learning.factories import FORMS


def list_settings() -> Iterator[str]:
    """Yield one line for each setting of a run, with its type, default and description."""
    yield from _list_fields(ExperimentConfig, "", ExperimentConfig())


def list_datasets() -> Iterator[str]:
    """Yield the data sets and the settings that they need."""
    for dataset in sources.list_datasets():
        required = f" (set {', '.join(dataset.settings)})" if dataset.settings else ""
        download = "; data.download: true fetches it" if dataset.downloads else ""
        yield f"{dataset.name}: {dataset.summary}{required}{download}"


def list_models() -> Iterator[str]:
    """Yield the bundled models and their parameters."""
    for name in models.MODELS:
        summary, params = models.describe(name)
        yield f"{name}: {summary}"
        yield from _list_fields(params, "    ")
    yield f"your own model: {FORMS}"


def list_strategies() -> Iterator[str]:
    """Yield the strategies and their parameters."""
    for name in query_strategies.available():
        summary, params = query_strategies.describe(name)
        yield f"{name}: {summary}"
        yield from _list_fields(params, "    ")
    yield "your own strategy: ./FILE.py for a file beside the sweep file"


def _list_fields(config: type[Config], prefix: str, defaults: Config | None = None) -> Iterator[str]:
    """Yield one line for each setting of ``config``; the default values are those of ``defaults`` if it is given."""
    for key, field in config.model_fields.items():
        default = getattr(defaults, key) if defaults is not None else field.get_default(call_default_factory=True)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from _list_fields(field.annotation, f"{prefix}{key}.", default)
        elif key == "imbalance":
            for kind, variant in IMBALANCES.items():
                yield f"{prefix}{key}={kind}: {_one_line(variant.__doc__)}"
                yield from list(_list_fields(variant, f"    {prefix}{key}."))[1:]  # the first field is the kind
        else:
            text = "required" if default is PydanticUndefined else f"default {format_value(default)}"
            description = f": {_one_line(field.description)}" if field.description else ""
            yield f"{prefix}{key} ({_format_type(field.annotation)}, {text}){description}"


def format_value(value: Any) -> str:
    """Return ``value`` as it is written in a sweep file."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).splitlines()[0]


def _format_type(annotation: Any) -> str:
    if annotation is NoneType:
        return "null"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _format_type(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_format_type, arguments))
    return str((origin or annotation).__name__)


def _one_line(text: str | None) -> str:
    return re.sub(r"\bNone\b", "null", " ".join((text or "").replace("``", "").split()))

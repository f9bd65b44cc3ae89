"""A sweep file and the runs that it describes.

name: demo
base: {data: ..., strategy: ..., ...}     # settings of every run (fishermask.config.ExperimentConfig)
grid:                                     # every combination of these; keys are dotted paths into base
  strategy: [fisher_mask, margin, random]
  seed: [0, 1, 2]
"""

import copy
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from fishermask import query_strategies
from fishermask.config import SHARDING, Config, ExperimentConfig, PathText, StrategyConfig, flatten, hash_json, parse
from fishermask.errors import InputError
from fishermask.guard import short
from fishermask.paths import check_text, invalid_character
from fishermask.results.files import RunFolder
from fishermask.results.tables import strategy_label
from fishermask.user_modules import absolute_file_name, split_file_name
from fishermask.yaml_files import parse_yaml, read_yaml

MAX_RUNS = 10_000
"""Maximum number of runs in a sweep. All runs are checked before the first run starts."""
NAMED = ("model", "strategy")
"""Sections of the settings that may name a file of the user."""
MAX_KEY = 500
"""Maximum number of characters of a dotted path in an override."""


class SweepConfig(Config):
    """A sweep file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the folder of results, ``<output>/<name>``."""
    description: Annotated[str, AfterValidator(check_text)] = ""
    base: dict[str, Any] = {}
    """Settings of every run."""
    grid: dict[str, list[Any]] = {}
    """Dotted paths into ``base``, each with a list of its values."""
    output: PathText = "results"


@dataclass(frozen=True)
class Run:
    """One combination of the grid."""

    name: str
    config: ExperimentConfig
    folder: RunFolder


@dataclass(frozen=True)
class Sweep:
    """A sweep and all its runs."""

    config: SweepConfig
    folder: Path
    runs: list[Run]


def load(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep file and apply ``key=value`` overrides to it.

    A key is ``name``, ``output``, ``description`` or a dotted path into ``base``. For a path that the grid varies, a
    list replaces its values, and any other value becomes its only value. ``grid.PATH=[...]`` varies another path.

    Raises:
        InputError: the file or an override is invalid.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected the keys name, base and grid")
    content = copy.deepcopy(content)
    content.setdefault("base", {})
    content.setdefault("grid", {})
    config = absolute_files(parse(SweepConfig, content, f"{path}:"), path.parent)
    content = config.model_dump()
    for setting in overrides:
        key, equals, text = setting.partition("=")
        if not equals or "" in key.split("."):
            raise InputError(f"{short(key or setting)}: expected key=value")
        if (character := invalid_character(key)) or len(key) > MAX_KEY:
            raise InputError(
                f"{short(key)}: {f'contains {character}' if character else 'is too long'}; expected key=value"
            )
        if key in ("name", "output", "description"):
            content[key] = text
            continue
        value = parse_yaml(text, key, f"{short(text)} is not YAML")
        if key in ("base", "grid"):
            raise InputError(f"{key}: cannot be replaced; set a path in it, such as seed=3 or grid.seed=[1,2]")
        if key.startswith("grid."):
            content["grid"][key.removeprefix("grid.")] = value
        elif key in content["grid"]:
            content["grid"][key] = value if isinstance(value, list) else [value]
        elif parents := [path for path in content["grid"] if key.startswith(f"{path}.")]:
            raise InputError(f"{key}: the grid varies {parents[0]}, which would replace it; give {parents[0]}=VALUE")
        else:
            _set_value(content["base"], key, value)
    return absolute_files(parse(SweepConfig, content), Path.cwd())


def absolute_files(config: SweepConfig, folder: Path) -> SweepConfig:
    """Return ``config`` with absolute paths of the user's strategy and model files, relative to ``folder``."""

    def absolute(value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            return value | {"name": absolute_file_name(value["name"], folder)}
        return absolute_file_name(value, folder) if isinstance(value, str) else value

    base = {key: absolute(value) if key in NAMED else value for key, value in config.base.items()}
    grid = {
        key: [absolute(value) for value in values] if key.removesuffix(".name") in NAMED else values
        for key, values in config.grid.items()
    }
    return config.model_copy(update={"base": base, "grid": grid})


def expand(config: SweepConfig) -> Sweep:
    """Return all runs of a sweep, the seed varying slowest and the strategy fastest.

    Raises:
        InputError: the grid or a combination is not valid, two combinations are equal, or two strategies have the same
            label.
    """
    for key in config.grid:
        if not config.grid[key]:
            raise InputError(f"grid.{key}: no values; give at least one")
        if parents := [path for path in config.grid if key.startswith(f"{path}.")]:
            raise InputError(f"grid.{key}: {parents[0]} is varied too, and replaces it; vary one of them")
    # The seed varies slowest, so that an interrupted sweep has compared all strategies on its first seeds.
    keys = sorted(config.grid, key=lambda key: (key.startswith("strategy"), key != "seed"))
    count = math.prod(len(config.grid[key]) for key in keys)
    if count > MAX_RUNS:
        raise InputError(f"grid: describes {count:,} runs, and a sweep has at most {MAX_RUNS:,}; vary fewer values")
    configs, varied_values = [], []
    for values in itertools.product(*(config.grid[key] for key in keys)):
        settings = copy.deepcopy(config.base)
        for key, value in zip(keys, values, strict=True):
            _set_value(settings, key, copy.deepcopy(value))
        configs.append(parse(ExperimentConfig, settings))
        varied_values.append(dict(zip(keys, values, strict=True)))
    _check_labels([run_config.strategy for run_config in configs])
    folder = Path(config.output).expanduser().absolute() / config.name
    runs: dict[str, Run] = {}  # by name in lower case, because some file systems ignore case
    for run_config, varied in zip(configs, varied_values, strict=True):
        name = _run_name(run_config, varied)
        first = runs.get(name.casefold())
        if first is not None and first.name != name:
            raise InputError(
                f"grid: the run names {first.name} and {name} differ only in upper and lower case; change a "
                "strategy.label or another value"
            )
        if first is not None:
            same = first.config == run_config
            labels = {strategy_label(first.config.strategy), strategy_label(run_config.strategy)}
            remedy = f"give {'labels' if len(labels) > 1 else 'values'} that differ in letters or digits"
            problem = "occurs twice in the grid" if same else f"is the name of two runs; {remedy}"
            raise InputError(f"grid: {name} {problem}")
        runs[name.casefold()] = Run(name, run_config, RunFolder(folder / "runs" / name))
    return Sweep(config, folder, list(runs.values()))


def run_names(folder: Path) -> set[str] | None:
    """Return the names of the runs in the grid of a sweep's folder; None if its ``config.yaml`` is not valid here."""
    path = folder / "config.yaml"
    try:
        return {run.name for run in expand(parse(SweepConfig, read_yaml(path), f"{path}:")).runs}
    except InputError:
        return None


def _check_labels(strategies: list[StrategyConfig]) -> None:
    """Raise ``InputError`` if a label names two strategies: tables and the baseline would mix them up."""
    variants: dict[str, StrategyConfig] = {}
    for strategy in strategies:
        label = strategy_label(strategy)
        if strategy.label not in (None, strategy.name) and strategy.label in query_strategies.available():
            raise InputError(
                f"strategy.label: {short(strategy.label)} is the name of another strategy than {strategy.name}; choose "
                "another label"
            )
        first = variants.setdefault(label, strategy)
        if (first.name, first.params) != (strategy.name, strategy.params):
            raise InputError(
                f"strategy.label: {short(label)} names two strategies, {_describe(first)} and {_describe(strategy)}; "
                "give each its own label"
            )


def _describe(strategy: StrategyConfig) -> str:
    return strategy_label(strategy.model_copy(update={"label": None}))


def select_first_run(config: SweepConfig) -> SweepConfig:
    """Return the sweep of one run that ``fishermask run`` computes: the first value of each path that the grid varies.

    Its name ends with a hash of the settings that are not defaults. Its folder therefore differs from the folder of the
    whole sweep, and another version of fishermask uses the same folder for the same settings.
    """
    config = config.model_copy(update={"grid": {key: values[:1] for key, values in config.grid.items()}})
    excluded = {"resources": SHARDING, "strategy": {"label"}}
    settings = expand(config).runs[0].config.model_dump(mode="json", exclude=excluded, exclude_defaults=True)
    return config.model_copy(update={"name": f"{config.name}-{hash_json(flatten(settings))[:8]}"})


def _set_value(settings: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        inner = settings.get(part)
        if isinstance(inner, str):  # strategy: margin is short for strategy: {name: margin}
            inner = settings[part] = {"kind" if part == "imbalance" else "name": inner}
        elif inner is None:
            inner = settings[part] = {}
        elif not isinstance(inner, dict):
            raise InputError(f"{path}: {part} is {short(inner)}, which has no keys")
        settings = inner
    settings[last] = value


def _run_name(config: ExperimentConfig, values: dict[str, Any]) -> str:
    parts = [strategy_label(config.strategy)]
    for key, value in values.items():
        if not key.startswith("strategy"):
            leaf = key.rpartition(".")[2]
            unique = [other.rpartition(".")[2] for other in values].count(leaf) == 1
            parts.append(f"{leaf if unique else key}={_short_text(value)}")
    # The seed varies slowest but reads best at the end.
    parts.sort(key=lambda part: part.startswith("seed="))
    name = re.sub(r"[^A-Za-z0-9._=,()+-]+", "_", "-".join(parts))
    if len(name) > 200:
        raise InputError(f"grid: the run {short(name)} has a name of {len(name)} characters; vary shorter values")
    return name


def _short_text(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}={_short_text(inner)}" for key, inner in value.items())
    if isinstance(value, str) and (parts := split_file_name(value)) is not None:
        file, attribute = parts
        return f"{file.stem}:{attribute}" if attribute else file.stem
    return "+".join(map(_short_text, value)) if isinstance(value, list) else str(value)

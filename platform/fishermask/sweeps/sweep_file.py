"""A sweep file and the runs that it means.

name: demo
base: {data: ..., strategy: ..., ...}     # settings of every run (fishermask.config.ExperimentConfig)
grid:                                     # every combination of these; keys are dotted paths into base
  strategy: [fisher_mask, margin, random]
  seed: [0, 1, 2]
"""

import copy
import itertools
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from fishermask.config import SHARDING, Config, ExperimentConfig, PathText, parse
from fishermask.errors import InputError
from fishermask.guard import guarded, short
from fishermask.paths import check_text, improper_character
from fishermask.results.files import RunFolder
from fishermask.results.tables import strategy_label
from fishermask.user_modules import absolute_file_name, split_file_name
from fishermask.yaml_files import parse_yaml, read_yaml

MAX_RUNS = 10_000
"""Of a sweep: each is checked before the first starts."""
NAMED = ("model", "strategy")
"""Sections of the settings that may name a file of the user."""
MAX_KEY = 500
"""Characters of a dotted path."""


class SweepConfig(Config):
    """A sweep file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Results lie in ``<output>/<name>``."""
    description: Annotated[str, AfterValidator(check_text)] = ""
    base: dict[str, Any] = {}
    """Settings of every run."""
    grid: dict[str, list[Any]] = {}
    """Dotted path into ``base`` -> the values it takes."""
    output: PathText = "results"


@dataclass(frozen=True)
class Run:
    """One combination of the grid."""

    name: str
    config: ExperimentConfig
    folder: RunFolder


@dataclass(frozen=True)
class Sweep:
    """A sweep file as resolved."""

    config: SweepConfig
    folder: Path
    runs: list[Run]


def load(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep file and apply ``key=value`` settings to it.

    A key is ``name``, ``output`` or a dotted path into ``base``. For a path that the grid varies, a list gives the
    values it shall take, and anything else the only one. ``grid.PATH=[...]`` makes the grid vary another path.

    Raises:
        InputError: the file or a setting is wrong; nothing has been run.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected the keys name, base and grid")
    content = copy.deepcopy(content)
    content.setdefault("base", {})
    content.setdefault("grid", {})
    config = absolute_files(parse(SweepConfig, content, str(path)), path.parent)
    content = config.model_dump()
    for setting in overrides:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise InputError(f"{short(setting)}: expected key=value")
        if (improper := improper_character(key)) or len(key) > MAX_KEY:
            raise InputError(f"{short(key)}: {f'holds {improper}' if improper else 'is too long'}; expected key=value")
        if key in ("name", "output", "description"):
            content[key] = text
            continue
        value = parse_yaml(text, key, f"{short(text)} is not YAML")
        if key in ("base", "grid"):
            raise InputError(
                f"{key}: cannot be replaced as a whole; set a path in it, such as seed=3 or grid.seed=[1,2]"
            )
        if key.startswith("grid."):
            content["grid"][key.removeprefix("grid.")] = value
        elif key in content["grid"]:
            content["grid"][key] = value if isinstance(value, list) else [value]
        elif above := [path for path in content["grid"] if key.startswith(f"{path}.")]:
            raise InputError(f"{key}: the grid varies {above[0]}, which would replace it; give {above[0]}=VALUE whole")
        else:
            _set(content["base"], key, value)
    config = absolute_files(parse(SweepConfig, content, str(path)), Path.cwd())
    for key, values in config.grid.items():
        if not values:
            raise InputError(f"grid.{key}: no values; give at least one")
        if above := [path for path in config.grid if key.startswith(f"{path}.")]:
            raise InputError(f"grid.{key}: {above[0]} is varied too, and replaces it; vary one of them")
    return config


def absolute_files(config: SweepConfig, folder: Path) -> SweepConfig:
    """Return ``config`` with absolute paths of the user's files of strategies and models, relative to ``folder``."""

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
    """All runs of a sweep, the seed varying slowest and the strategy fastest.

    Raises:
        InputError: a combination that is not valid, or two that are the same.
    """
    # Seeds outermost: a sweep that is cut short has compared all strategies on the seeds it reached.
    keys = sorted(config.grid, key=lambda key: (key.startswith("strategy"), key != "seed"))
    count = math.prod(len(config.grid[key]) for key in keys)
    if count > MAX_RUNS:
        raise InputError(f"grid: means {count:,} runs, and a sweep has at most {MAX_RUNS:,}; vary fewer values")
    configs, values_of = [], []
    for values in itertools.product(*(config.grid[key] for key in keys)):
        settings = copy.deepcopy(config.base)
        for key, value in zip(keys, values, strict=True):
            _set(settings, key, copy.deepcopy(value))
        configs.append(parse(ExperimentConfig, settings))
        values_of.append(dict(zip(keys, values, strict=True)))
    folder = Path(config.output).expanduser().absolute() / config.name
    runs: list[Run] = []
    seen: dict[str, str] = {}
    for run_config, varied in zip(configs, values_of, strict=True):
        name = _name(run_config, varied)
        fingerprint = run_config.fingerprint()
        if name in seen:
            what = "twice in the grid" if seen[name] == fingerprint else "the name of two runs; give strategy.label"
            raise InputError(f"grid: {name} is {what}")
        seen[name] = fingerprint
        runs.append(Run(name, run_config, RunFolder(folder / "runs" / name)))
    return Sweep(config, folder, runs)


def single(config: SweepConfig) -> SweepConfig:
    """The sweep of one run that ``fishermask run`` means: the first value of every path that the grid varies.

    Its folder has the run's fingerprint in its name, so that it never mixes with a sweep's results.
    """
    config = config.model_copy(update={"grid": {key: values[:1] for key, values in config.grid.items()}})
    fingerprint = expand(config).runs[0].config.fingerprint()
    return config.model_copy(update={"name": f"{config.name}-{fingerprint[:8]}"})


def check_folder(sweep: Sweep) -> None:
    """Raise ``InputError`` if the sweep's folder holds the results of another sweep.

    The same base and the same varied paths make it the same sweep: values may be added to a path at any time.
    """
    with guarded("output", f"{sweep.folder} cannot be used"):
        _check_folder(sweep)


def _check_folder(sweep: Sweep) -> None:
    remedy = "choose another name=NAME, or move it away"
    path = sweep.folder / "config.yaml"
    there_is = next(place for place in (sweep.folder, *sweep.folder.parents) if os.path.lexists(place))
    try:
        # To try is the only way to know: root may write anywhere, but for read-only file systems and such.
        Path(tempfile.mkdtemp(prefix=".writable.", dir=there_is)).rmdir()
    except OSError as error:
        raise InputError(
            f"output: cannot write to {sweep.folder} ({there_is}: {error.strerror}); choose another with output=DIR"
        ) from None
    if not os.path.lexists(path):
        if sweep.folder.exists() and any(file.name != ".lock" for file in sweep.folder.iterdir()):
            raise InputError(f"name: {sweep.folder} exists and is no sweep's results; {remedy}")
        return
    there = parse(SweepConfig, read_yaml(path), str(path))
    if set(there.grid) != set(sweep.config.grid):
        raise InputError(
            f"name: {sweep.folder} holds another sweep's results, which varies {', '.join(there.grid) or 'nothing'}; "
            + remedy
        )
    found = _first_difference(expand(there).runs[0].config, sweep.runs[0].config, ignored=set(there.grid))
    for run in sweep.runs:
        present = run.folder.config()
        if found is None and present is not None and present.fingerprint() != run.config.fingerprint():
            found = _first_difference(present, run.config, ignored=set())
    if found is not None:
        raise InputError(f"name: {sweep.folder} holds another sweep's results: {found}; {remedy}")


def _first_difference(old: ExperimentConfig, new: ExperimentConfig, ignored: set[str]) -> str | None:
    ignored_always = {"strategy.label", *(f"resources.{name}" for name in SHARDING)}
    left, right = _flat(old.model_dump()), _flat(new.model_dump())
    for key in sorted(left.keys() | right.keys()):
        skip = key in ignored_always
        skip = skip or any(key == path or key.startswith(f"{path}.") for path in ignored)
        if not skip and left.get(key) != right.get(key):
            return f"{key} is {short(left.get(key))} there, {short(right.get(key))} here"
    return None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _set(settings: dict[str, Any], path: str, value: Any) -> None:
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


def _name(config: ExperimentConfig, values: dict[str, Any]) -> str:
    parts = [strategy_label(config.strategy)]
    for key, value in values.items():
        if not key.startswith("strategy"):
            leaf = key.rpartition(".")[2]
            unique = [other.rpartition(".")[2] for other in values].count(leaf) == 1
            parts.append(f"{leaf if unique else key}={_brief(value)}")
    # The seed varies slowest but reads best at the end.
    parts.sort(key=lambda part: part.startswith("seed="))
    name = re.sub(r"[^A-Za-z0-9._=,()+-]+", "_", "-".join(parts))
    if len(name) > 200:
        raise InputError(f"grid: the run {short(name)} has a name of {len(name)} letters; vary shorter values")
    return name


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}={_brief(inner)}" for key, inner in value.items())
    if isinstance(value, str) and (parts := split_file_name(value)) is not None:
        file, attribute = parts
        return f"{file.stem}:{attribute}" if attribute else file.stem
    return "+".join(map(_brief, value)) if isinstance(value, list) else str(value)

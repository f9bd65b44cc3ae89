"""All rounds of a sweep as one table, and the summary of its finished runs."""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fishermask.config import ExperimentConfig, StrategyConfig
from fishermask.errors import InputError
from fishermask.paths import require_file
from fishermask.results.files import RunFolder, run_folders
from fishermask.yaml_files import read_yaml

METRICS = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1"}
"""Column of each metric -> its name in text."""
BASELINE = "random"
"""Name of the strategy that the other strategies are compared with."""


class UnfinishedRun(NamedTuple):
    """A run that does not have all its rounds."""

    name: str
    num_rounds: int
    """Finished rounds."""
    planned_rounds: int
    error: str
    """The error that ended its last attempt, in one line; empty if there was none."""


def setting(config: ExperimentConfig, path: str) -> Any:
    """Return the value at a dotted path of a config as one table cell; convert lists and mappings to text."""
    value: Any = config.model_dump()
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return format_value(value) if isinstance(value, dict | list) else value


def format_value(value: Any) -> str:
    """Return a setting as a sweep file writes it: ``20`` rather than ``20.0``, ``null``, ``true``, ``[1, 2]``."""
    if isinstance(value, dict):
        return " ".join(f"{key}={format_value(inner)}" for key, inner in value.items() if inner not in (None, {}, []))
    if isinstance(value, list):
        return f"[{', '.join(map(format_value, value))}]"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(float(value)).removesuffix(".0")
    return str(value)


def strategy_label(strategy: StrategyConfig) -> str:
    """Return the label of a strategy; without a label, its name with the parameters in its settings."""
    return strategy.label or _with_params(strategy, strategy.short_name)


def _with_params(strategy: StrategyConfig, name: str) -> str:
    params = ",".join(f"{key}={value}" for key, value in strategy.params.items())
    return f"{name}({params})" if params else name


def display_labels(strategies: Iterable[StrategyConfig]) -> dict[StrategyConfig, str]:
    """Return the label of each strategy in tables and pictures. Labels are distinct, even if settings share a label.

    A strategy keeps its label, or its name, if no other strategy has it. Otherwise, its parameters are added.
    """
    forms: dict[StrategyConfig, list[str]] = {}
    for strategy in strategies:
        full = _with_params(strategy, strategy.name)
        forms[strategy] = [strategy.label or strategy.short_name, strategy_label(strategy)]
        forms[strategy] += [f"{strategy.label} ({full})" if strategy.label else full]
    counts = Counter(text for texts in forms.values() for text in set(texts))
    return {
        strategy: next((text for text in texts if counts[text] == 1), texts[-1]) for strategy, texts in forms.items()
    }


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Return the shortest suffix of each dotted path that no other path ends with; the whole path if there is none."""
    parts = {path: path.split(".") for path in paths}
    counts = Counter(".".join(names[i:]) for names in parts.values() for i in range(len(names)))
    suffixes = {path: [".".join(names[i:]) for i in reversed(range(len(names)))] for path, names in parts.items()}
    return {path: next((name for name in names if counts[name] == 1), path) for path, names in suffixes.items()}


def varied_settings(sweep: Path) -> list[str]:
    """Return the dotted paths that a sweep varies, except for strategy and seed, which have separate columns."""
    path = sweep / "config.yaml"
    if not path.exists() and not path.is_symlink():
        raise InputError(f"{sweep}: holds no results of a sweep (no config.yaml)")
    content = read_yaml(path)
    grid = content.get("grid") if isinstance(content, dict) else None
    if not isinstance(grid, dict) or not all(isinstance(key, str) for key in grid):
        raise InputError(f"{path}: is damaged, it has no grid; run the sweep again to rewrite it")
    return [key for key in grid if key not in ("strategy", "strategy.name", "seed")]


def read_rounds(sweep: Path) -> tuple[pd.DataFrame, list[UnfinishedRun]]:
    """Return the rounds of all runs of a sweep, and its unfinished runs.

    Each row is one round. The columns are: the run; the strategy's name and its label in tables; each setting that the
    sweep varies; the seed; whether the run is finished; all values of the round in ``rounds.jsonl`` except for ids; and
    the columns of ``Provenance.round_columns``. A missing value is NaN or None.

    Raises:
        InputError: the folder holds no finished round.
    """
    varied = varied_settings(sweep)
    runs = [(folder, config) for folder in run_folders(sweep) if (config := folder.config()) is not None]
    labels = display_labels(config.strategy for _, config in runs)
    rows: list[dict[str, Any]] = []
    unfinished = []
    for folder, config in runs:
        history, planned = folder.history(), config.budget.num_rounds
        if len(history) < planned:
            unfinished.append(UnfinishedRun(folder.path.name, len(history), planned, _last_error(folder)))
        start: dict[str, Any] = {"run": folder.path.name, "strategy_name": config.strategy.name}
        start["strategy"] = labels[config.strategy]
        start |= {path: setting(config, path) for path in varied}
        start |= {"seed": config.seed, "finished": len(history) >= planned}
        for result, origin in zip(history, folder.provenance().round_columns(history), strict=True):
            row = {key: value for key, value in result.items() if not isinstance(value, dict | list)}
            for group, values in result.items():
                if isinstance(values, dict):
                    row |= {f"{group}.{name}": value for name, value in values.items()}
            rows.append(start | row | origin)
    if not rows:
        raise InputError(f"{sweep}: no round is finished yet")
    return pd.DataFrame(rows).apply(_unify_type), unfinished


def _last_error(folder: RunFolder) -> str:
    if not folder.error.exists():
        return ""
    require_file(folder.error)
    return error_line(folder.error.read_text(encoding="utf-8", errors="replace"))


def error_line(traceback: str) -> str:
    """Return the last line of a traceback, which holds the error."""
    lines = traceback.strip().splitlines()
    return lines[-1] if lines else "unknown error"


def _unify_type(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Return ``column`` with values of a single type, as Parquet requires: numbers if possible, otherwise text."""
    if column.dtype != object:
        return column
    values = column.dropna()
    types = set(map(type, values))
    if types <= {int, float} and all(abs(value) < 2**63 for value in values):
        return pd.to_numeric(column)
    return column.map(format_value, na_action="ignore") if types - {bool, str} or len(types) > 1 else column


def setting_columns(table: pd.DataFrame) -> list[str]:
    """Return the columns that hold varied settings."""
    names = list(table.columns)
    return names[names.index("strategy") + 1 : names.index("seed")]


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each cell. A cell is the runs of a strategy with one combination of settings.

    Only finished runs, which have all rounds of their budget, are included. Columns:

    * ``seeds``: number of finished runs of the cell. ``labels``: number of labels in their last round.
    * ``final_METRIC``: metric of the last round, at the end of the budget; the mean over seeds.
    * ``mean_METRIC``: mean of the metric over the rounds after round 0; the mean over seeds. All strategies of a seed
      share the labeled set and the model of round 0, so that round does not depend on the strategy.
    * ``gain``, except for ``random``: difference in ``mean_balanced_accuracy`` between the run and the run of
      ``random`` with the same settings and seed; the mean over the seeds for which both runs are finished.
    * ``pairs``: number of these seeds.
    * ``wins``: pairs with a positive difference.

    ``*_sd`` is the standard deviation over seeds. Cells are sorted by settings, then by ``mean_balanced_accuracy``.
    """
    settings, score = setting_columns(table), "mean_balanced_accuracy"
    cell = [*settings, "strategy_name", "strategy"]
    finished = table[table["finished"]].sort_values("round")
    last = finished.drop_duplicates("run", keep="last").set_index("run")
    means = finished[finished["round"] > 0].groupby("run")[list(METRICS)].mean()
    runs = last[[*cell, "seed", "labels"]].join([last[list(METRICS)].add_prefix("final_"), means.add_prefix("mean_")])
    # A strategy without parameters gives the same runs under any label.
    baseline = runs[runs["strategy_name"] == BASELINE].drop_duplicates([*settings, "seed"])
    baseline = baseline[[*settings, "seed", score]].rename(columns={score: "baseline"})
    runs = runs.merge(baseline, how="left", on=[*settings, "seed"])
    runs["gain"] = (runs[score] - runs["baseline"]).where(runs["strategy_name"] != BASELINE)
    rows = []
    all_cells = table[cell].drop_duplicates().merge(runs, how="left", on=cell)
    for values, group in all_cells.groupby(cell, sort=False, dropna=False):
        row = dict(zip(cell, values, strict=True))
        row |= {"seeds": int(group["seed"].notna().sum()), "labels": group["labels"].max()}
        for column in [f"{kind}_{metric}" for metric in METRICS for kind in ("final", "mean")]:
            row |= {column: group[column].mean(), f"{column}_sd": group[column].std()}
        gain = group["gain"].dropna()
        row |= {"gain": gain.mean(), "gain_sd": gain.std(), "wins": int((gain > 0).sum()), "pairs": len(gain)}
        rows.append(row)
    order = [*settings, score]
    return pd.DataFrame(rows).sort_values(order, ascending=[True] * len(settings) + [False], kind="stable")


def rounds_to_show(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rounds that curves show: those of finished runs, and those of all runs of a cell without any."""
    finished = table.groupby([*setting_columns(table), "strategy"], dropna=False)["finished"].transform("any")
    return table[table["finished"] | ~finished]


def group_settings(table: pd.DataFrame) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Return the rounds of each combination of settings, with the values of the settings."""
    settings = setting_columns(table)
    if not settings:
        return [((), table)]
    return [(values, group) for values, group in table.groupby(settings, dropna=False)]


def describe_settings(settings: list[str], values: tuple[Any, ...]) -> str:
    """Return a text such as ``ratio = 20, query = 40``."""
    names = short_names(settings)
    return ", ".join(f"{names[path]} = {format_value(value)}" for path, value in zip(settings, values, strict=True))

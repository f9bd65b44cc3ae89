"""All rounds of a sweep as one table, and what is read off it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from fishermask.config import ExperimentConfig, StrategyConfig
from fishermask.errors import InputError
from fishermask.results.files import run_folders
from fishermask.yaml_files import read_yaml

METRICS = ("accuracy", "balanced_accuracy", "macro_f1")
BASELINE = "random"


def setting(config: ExperimentConfig, path: str) -> Any:
    """The value at a dotted path of a config, as one cell: numbers and text as they are, the rest as text."""
    value: Any = config.model_dump()
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, dict):
        return " ".join(f"{key}={inner}" for key, inner in value.items() if inner not in (None, {}, []))
    return ",".join(map(str, value)) if isinstance(value, list) else value


def text(value: Any) -> str:
    """A cell as people read it: ``20``, not ``20.0``."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def strategy_label(strategy: StrategyConfig) -> str:
    """The strategy with the parameters that were given, or the label that was."""
    given = ",".join(f"{key}={value}" for key, value in strategy.params.items())
    return strategy.label or (f"{strategy.name}({given})" if given else strategy.name)


def short_labels(strategies: Iterable[StrategyConfig]) -> dict[str, str]:
    """Full label -> what tables and pictures say: the name alone where one variant of it was run."""
    names = {strategy_label(strategy): strategy.label or strategy.name for strategy in strategies}
    return {label: name if list(names.values()).count(name) == 1 else label for label, name in names.items()}


def varied_settings(sweep: Path) -> list[str]:
    """Dotted paths that a sweep varies, but for strategy and seed, which have columns of their own."""
    path = sweep / "config.yaml"
    if not path.exists() and not path.is_symlink():
        raise InputError(f"{sweep}: holds no results of a sweep (no config.yaml)")
    content = read_yaml(path)
    grid = content.get("grid") if isinstance(content, dict) else None
    if not isinstance(grid, dict) or not all(isinstance(key, str) for key in grid):
        raise InputError(f"{path}: is damaged, it has no grid; run the sweep again to write it anew")
    return [key for key in grid if key not in ("strategy", "strategy.name", "seed")]


def collect(sweep: Path) -> pd.DataFrame:
    """One row a round: run, strategy, seed, each setting that varies, labels, metrics, recalls, seconds.

    Raises:
        InputError: the folder holds no finished round.
    """
    varied = varied_settings(sweep)
    rows = []
    runs = [(folder, config) for folder in run_folders(sweep) if (config := folder.config()) is not None]
    names = short_labels(config.strategy for _, config in runs)
    for folder, config in runs:
        start = {"run": folder.path.name, "strategy": names[strategy_label(config.strategy)]}
        start |= {path: setting(config, path) for path in varied} | {"seed": config.seed}
        for result in folder.history():
            row = {key: value for key, value in result.items() if not isinstance(value, dict | list)}
            for group in ("recall", "batch_classes", "seconds"):
                row |= {f"{group}.{name}": value for name, value in result[group].items()}
            rows.append(start | row)
    if not rows:
        raise InputError(f"{sweep}: no round is finished yet")
    return pd.DataFrame(rows)


def setting_columns(table: pd.DataFrame) -> list[str]:
    """The columns that hold varied settings."""
    names = list(table.columns)
    return names[names.index("strategy") + 1 : names.index("seed")]


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each setting and strategy: means and deviations over seeds, and pairs against random.

    Columns: ``runs``; for each metric its mean over a run's rounds (``*_curve``) and in the last round (``*_final``),
    each with ``_sd``; ``gain`` and ``gain_sd``: the difference in balanced accuracy over the rounds to random with the
    same seed, ``wins`` of ``pairs`` such seeds. Runs that are not finished count with the rounds they have.
    """
    settings = setting_columns(table)
    keys = [*settings, "strategy", "seed"]
    runs = table.sort_values("labels").groupby(keys, sort=False, dropna=False)[list(METRICS)]
    curve, final = runs.mean().add_suffix("_curve"), runs.last().add_suffix("_final")
    per_run = pd.concat([curve, final, table.groupby(keys, dropna=False)["labels"].max()], axis=1).reset_index()
    score = "balanced_accuracy_curve"
    baseline = per_run[per_run["strategy"] == BASELINE]
    baseline = baseline[[*settings, "seed", "labels", score]].rename(columns={score: "baseline"})
    # Only runs that got as far as their partner are compared with it.
    paired = per_run.merge(baseline, how="left", on=[*settings, "seed", "labels"])
    paired["gain"] = paired[score] - paired["baseline"]
    rows = []
    for values, group in paired.groupby([*settings, "strategy"], sort=False, dropna=False):
        row = dict(zip([*settings, "strategy"], values, strict=True)) | {"runs": len(group)}
        row |= {"labels": group["labels"].max()}
        for column in [f"{metric}_{kind}" for metric in METRICS for kind in ("curve", "final")]:
            row |= {column: group[column].mean(), f"{column}_sd": group[column].std()}
        gain = group["gain"].dropna()
        row |= {"gain": gain.mean(), "gain_sd": gain.std(), "wins": int((gain > 0).sum()), "pairs": len(gain)}
        rows.append(row)
    order = [*settings, score]
    return pd.DataFrame(rows).sort_values(order, ascending=[True] * len(settings) + [False], kind="stable")

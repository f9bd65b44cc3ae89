"""Everything that a reader opens first: results.parquet, results.csv, curves.png, summary.md."""

import io
from pathlib import Path

import pandas as pd

from fishermask.results import curves
from fishermask.results.files import write_atomically
from fishermask.results.tables import BASELINE, METRICS, collect, setting_columns, summarize, text

FEW_SEEDS = 5


def write(sweep: Path, metric: str = "balanced_accuracy") -> pd.DataFrame:
    """Write the four files from what the runs of ``sweep`` have finished; return the summary."""
    table = collect(sweep)
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    write_atomically(sweep / "results.parquet", buffer.getvalue())
    write_atomically(sweep / "results.csv", table.to_csv(index=False))
    curves.save(curves.draw(table, metric, sweep.name), sweep / "curves.png")
    summary = summarize(table)
    write_atomically(sweep / "summary.md", markdown(summary, table, sweep.name))
    return summary


def spread(mean: float, deviation: float, sign: str = "") -> str:
    """``0.612±0.011``; no deviation where there is one run only, a dash where there is none."""
    if pd.isna(mean):
        return "–"
    return f"{mean:{sign}.3f}" + ("" if pd.isna(deviation) else f"±{deviation:.3f}")


def cells(summary: pd.DataFrame, brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the summary as text; ``brief`` leaves out what a narrow terminal has no room for."""
    settings = list(summary.columns[: list(summary.columns).index("strategy")])
    columns: dict[str, list[str]] = {path.rpartition(".")[2]: [text(v) for v in summary[path]] for path in settings}
    records = summary.to_dict("records")
    columns["strategy"] = [str(r["strategy"]) for r in records]
    if not brief:
        columns["seeds"] = [str(r["runs"]) for r in records]
        columns["labels"] = [str(r["labels"]) for r in records]
    for metric in ("balanced_accuracy",) if brief else METRICS:
        columns[f"{metric.replace('_', ' ')} at the end"] = [
            spread(r[f"{metric}_final"], r[f"{metric}_final_sd"]) for r in records
        ]
    name = "mean over rounds" if brief else "balanced accuracy, mean over rounds"
    columns[name] = [spread(r["balanced_accuracy_curve"], r["balanced_accuracy_curve_sd"]) for r in records]
    paired = [r["strategy"] != BASELINE and r["pairs"] > 0 for r in records]
    columns["gain on random"] = [
        spread(r["gain"], r["gain_sd"], "+") if pair else "–" for r, pair in zip(records, paired, strict=True)
    ]
    columns["seeds better"] = [
        f"{r['wins']} of {r['pairs']}" if pair else "–" for r, pair in zip(records, paired, strict=True)
    ]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def caveat(summary: pd.DataFrame) -> str:
    """How far the numbers can be trusted."""
    seeds = int(summary["runs"].min())
    text = "Mean ± standard deviation over seeds; gain: paired with random, same seed, mean over rounds."
    if seeds < FEW_SEEDS:
        text += f" With {seeds} seed{'s' * (seeds != 1)} this is a smoke test: no difference here is evidence."
    return text


def markdown(summary: pd.DataFrame, table: pd.DataFrame, name: str) -> str:
    """The page ``summary.md``."""
    header, rows = cells(summary)
    lines = [
        f"# {name}",
        "",
        caveat(summary),
        "",
        "![learning curves](curves.png)",
        "",
        "## At the end of the budget",
    ]
    lines += ["", *_markdown_table(header, rows), "", "## Balanced accuracy by number of labels"]
    settings = setting_columns(table)
    for values, panel in table.groupby(settings, dropna=False) if settings else [((), table)]:
        grouped = panel.groupby(["strategy", "labels"])["balanced_accuracy"]
        means, deviations = grouped.mean().unstack(), grouped.std().unstack()
        body = [
            [str(strategy)] + [spread(means.loc[strategy, n], deviations.loc[strategy, n]) for n in means.columns]
            for strategy in means.index
        ]
        if settings:
            lines += ["", f"### {curves.panel_title(settings, values)}"]
        lines += ["", *_markdown_table(["strategy", *map(str, means.columns)], body)]
    capped = table[table["ended_by"] == "cap"]
    if len(capped):
        lines += ["", f"Training ended at its cap of epochs, below the target accuracy, in {len(capped)} of "]
        lines[-1] += f"{len(table)} rounds."
    return "\n".join(lines) + "\n"


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]

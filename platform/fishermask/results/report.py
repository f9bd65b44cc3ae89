"""The report of a sweep: results.parquet, results.csv, curves.png and summary.md."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from fishermask.results import curves
from fishermask.results.files import write_atomically
from fishermask.results.tables import (
    BASELINE,
    METRICS,
    UnfinishedRun,
    describe_settings,
    format_value,
    group_settings,
    read_rounds,
    rounds_to_show,
    setting_columns,
    short_names,
    summarize,
)

MIN_SEEDS = 5
"""With fewer seeds, a note says that they are too few."""
NO_VALUE = "–"

COLUMN_NOTES = """\
* **seeds**: finished runs, one per seed. Unfinished and failed runs do not count in this table.
* **final**: at the end of the budget, in the last round.
* **mean balanced accuracy**: mean over the rounds after round 0. Round 0 is the same for all strategies of a seed: they
  share its labeled set and its model.
* **gain over random**: difference in mean balanced accuracy from the run of `random` with the same settings and seed.
* **seeds above random**: seeds with a positive gain, of the seeds that finished with both strategies.

Values are the mean ± one standard deviation over seeds."""


class Report(NamedTuple):
    """What a report shows of a sweep."""

    summary: pd.DataFrame
    """As ``tables.summarize`` returns it."""
    unfinished: list[UnfinishedRun]


def write(sweep: Path, metric: str = "balanced_accuracy") -> Report:
    """Write the four files from the finished rounds of ``sweep``.

    Args:
        metric: metric of the curves.

    Raises:
        InputError: the folder holds no finished round, or cannot be written.
    """
    table, unfinished = read_rounds(sweep)
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    write_atomically(sweep / "results.parquet", buffer.getvalue())
    write_atomically(sweep / "results.csv", table.to_csv(index=False))
    curves.save(curves.draw(table, metric, sweep.name), sweep / "curves.png")
    report = Report(summarize(table), unfinished)
    write_atomically(sweep / "summary.md", format_page(report, table, sweep.name))
    return report


def format_mean(mean: float, deviation: float, sign: str = "") -> str:
    """Return ``0.612±0.011``, ``0.612`` if the deviation of one value is undefined, or a dash for no value."""
    if pd.isna(mean):
        return NO_VALUE
    return f"{mean:{sign}.3f}" + ("" if pd.isna(deviation) else f"±{deviation:.3f}")


def format_summary(summary: pd.DataFrame, brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the summary as text; ``brief`` leaves out columns for a narrow terminal."""
    settings = list(summary.columns[: list(summary.columns).index("strategy_name")])
    records = summary.to_dict("records")
    columns = {name: [format_value(r[path]) for r in records] for path, name in short_names(settings).items()}
    columns["strategy"] = [r["strategy"] for r in records]
    columns["seeds"] = [str(r["seeds"]) for r in records]
    if not brief:
        columns["labels"] = [NO_VALUE if pd.isna(r["labels"]) else f"{r['labels']:.0f}" for r in records]
    for metric in ("balanced_accuracy",) if brief else METRICS:
        values = [format_mean(r[f"final_{metric}"], r[f"final_{metric}_sd"]) for r in records]
        columns[f"final {METRICS[metric]}"] = values
    means = [format_mean(r["mean_balanced_accuracy"], r["mean_balanced_accuracy_sd"]) for r in records]
    columns["mean balanced accuracy"] = means
    paired = [r["strategy_name"] != BASELINE and r["pairs"] > 0 for r in records]
    gains = [format_mean(r["gain"], r["gain_sd"], "+") for r in records]
    wins = [f"{r['wins']} of {r['pairs']}" for r in records]
    for name, values in (("gain over random", gains), ("seeds above random", wins)):
        columns[name] = [value if pair else NO_VALUE for value, pair in zip(values, paired, strict=True)]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def format_notes(report: Report) -> list[str]:
    """Return sentences that say how far the numbers can be trusted."""
    seeds = report.summary["seeds"]
    notes = []
    if report.unfinished:
        notes.append(f"{_count(len(report.unfinished), 'run')} not finished; the table does not count them.")
    if seeds.min() != seeds.max():
        notes.append(f"Cells have different numbers of seeds ({seeds.min()} to {seeds.max()}).")
    if seeds.min() < MIN_SEEDS:
        notes.append(f"Fewer than {MIN_SEEDS} seeds are a smoke test: they are no evidence for a difference.")
    notes.append("No significance test was made.")
    return notes


def _count(number: int, noun: str) -> str:
    return f"{number} {noun} is" if number == 1 else f"{number} {noun}s are"


def format_page(report: Report, table: pd.DataFrame, name: str, picture: str = "curves.png") -> str:
    """Return the page ``summary.md``."""
    header, rows = format_summary(report.summary)
    lines = [f"# {name}", "", " ".join(format_notes(report)), "", f"![learning curves]({picture})", "", "## Summary"]
    lines += ["", *_markdown_table(header, rows), "", COLUMN_NOTES]
    lines += ["", "## Balanced accuracy by number of labels", ""]
    lines += ["Finished runs; all runs of a strategy that has no finished run with these settings."]
    settings = setting_columns(table)
    for values, panel in group_settings(rounds_to_show(table)):
        grouped = panel.groupby(["strategy", "labels"])["balanced_accuracy"]
        means, deviations = grouped.mean().unstack(), grouped.std().unstack()
        body = [
            [str(strategy)] + [format_mean(means.loc[strategy, n], deviations.loc[strategy, n]) for n in means.columns]
            for strategy in means.index
        ]
        if settings:
            lines += ["", f"### {describe_settings(settings, values)}"]
        lines += ["", *_markdown_table(["strategy", *map(str, means.columns)], body)]
    capped = int((table["ended_by"] == "cap").sum())
    if capped:
        lines += ["", f"Training ended at `training.max_epochs`, below the target accuracy, in {capped} of "]
        lines[-1] += f"{len(table)} rounds."
    if report.unfinished:
        body = [[run.name, f"{run.num_rounds} of {run.planned_rounds}", run.error] for run in report.unfinished]
        lines += ["", "## Unfinished runs", "", *_markdown_table(["run", "finished rounds", "error"], body)]
    return "\n".join(lines) + "\n"


def _markdown_table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (header, *rows)]
    lines.insert(1, " | ".join(["---"] * len(header)))
    return [f"| {line} |" for line in lines]

"""The report of a sweep: results.parquet, results.csv, curves.png and summary.md."""

import io
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from fishermask.results import curves
from fishermask.results.files import RunFolder, run_folders, write_atomically
from fishermask.results.provenance import count_runs, describe_mixed_runs
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
    varied_settings,
)

MAX_DIFFERENCES = 5
"""Maximum number of values that the note on runs with different settings lists."""
MIN_SEEDS = 5
"""With fewer seeds, the report notes that they are too few."""
NO_VALUE = "–"

COLUMN_NOTES = """\
* **seeds**: finished runs, one per seed. Unfinished and failed runs do not count in this table.
* **final**: at the end of the budget, in the last round.
* **mean balanced accuracy**: mean over the rounds after round 0. Round 0 is the same for all strategies of a seed: they
  share its labeled set and its model.
* **gain over random**: difference in mean balanced accuracy from the run of `random` with the same settings and seed.
* **seeds above random**: seeds with a positive gain, of the seeds that finished with both strategies.

Values are the mean ± one standard deviation over seeds."""

BRIEF_NOTE = """\
Balanced accuracy of finished runs: mean ± standard deviation over seeds. final: last round; mean: rounds after round 0;
gain: difference in mean from random with the same seed; gain > 0: seeds with a positive gain."""


class Report(NamedTuple):
    """The content of a report."""

    summary: pd.DataFrame
    """As ``tables.summarize`` returns it."""
    unfinished: list[UnfinishedRun]
    notes: list[str]
    """Sentences about the rounds in the tables."""


def create(
    sweep: Path, table: pd.DataFrame, unfinished: list[UnfinishedRun], grid: Collection[str] | None = None
) -> Report:
    """Return the report of the rounds that ``tables.read_rounds`` returned for ``sweep``.

    Args:
        grid: names of the runs in the current grid of the sweep; None if they are unknown.
    """
    names = [folder.path.name for folder in run_folders(sweep)]
    notes = _mixed_runs(sweep, table)
    if grid is not None and (others := sum(name not in grid for name in names)):
        verb = "is" if others == 1 else "are"
        notes.append(
            f"{others} of {count_runs(len(names))} in the folder {verb} not in the current grid; the tables include "
            "them."
        )
    if capped := int((table["ended_by"] == "cap").sum()):
        notes.append(f"Training ended at training.max_epochs in {capped} of {len(table)} rounds.")
    return Report(summarize(table), unfinished, notes)


def _mixed_runs(sweep: Path, table: pd.DataFrame) -> list[str]:
    """Return notes on values that are not the same in all runs, although the sweep does not vary them."""
    if "identity" not in table:
        return []
    runs = []
    for run, hashes in table.groupby("run")["identity"].unique().items():
        recorded = RunFolder(sweep / "runs" / str(run)).provenance().identities
        runs.append([recorded[name] for name in hashes if name in recorded])
    phrases = describe_mixed_runs(runs, {*varied_settings(sweep), "strategy", "seed"})
    notes = []
    if settings := phrases.pop("settings", []):
        notes.append(f"The runs have different settings: {_join(settings)} (column config_hash).")
    if others := [phrase for section in phrases.values() for phrase in section]:
        notes.append(f"The runs have different software or devices: {_join(others)} (provenance.json of each run).")
    return notes


def _join(phrases: list[str]) -> str:
    more = len(phrases) - MAX_DIFFERENCES
    return "; ".join(phrases[:MAX_DIFFERENCES] + ([f"{more} more"] if more > 0 else []))


def write(sweep: Path, metric: str = "balanced_accuracy", grid: Collection[str] | None = None) -> Report:
    """Write the four files from the finished rounds of ``sweep``.

    Args:
        metric: metric of the curves.
        grid: names of the runs in the current grid of the sweep; None if they are unknown.

    Raises:
        InputError: the folder holds no finished round, or cannot be written.
    """
    table, unfinished = read_rounds(sweep)
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    write_atomically(sweep / "results.parquet", buffer.getvalue())
    write_atomically(sweep / "results.csv", table.to_csv(index=False))
    curves.save(curves.draw(table, metric, sweep.name), sweep / "curves.png")
    report = create(sweep, table, unfinished, grid)
    write_atomically(sweep / "summary.md", format_page(report, table, sweep.name))
    return report


def format_mean(mean: float, deviation: float, sign: str = "") -> str:
    """Return ``0.612±0.011``, ``0.612`` if the deviation of one value is undefined, or a dash for no value."""
    if pd.isna(mean):
        return NO_VALUE
    return f"{mean:{sign}.3f}" + ("" if pd.isna(deviation) else f"±{deviation:.3f}")


def format_summary(summary: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the summary as text."""
    records = summary.to_dict("records")
    columns = _leading_columns(summary, _settings(summary))
    columns["labels"] = [NO_VALUE if pd.isna(r["labels"]) else f"{r['labels']:.0f}" for r in records]
    for metric, name in METRICS.items():
        columns[f"final {name}"] = _format_column(summary, f"final_{metric}")
    columns["mean balanced accuracy"] = _format_column(summary, "mean_balanced_accuracy")
    columns["gain over random"] = _format_column(summary, "gain", "+")
    columns["seeds above random"] = _wins(summary)
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def format_brief_summary(summary: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the balanced accuracies as text, for a terminal; ``BRIEF_NOTE`` explains them.

    Settings with a single value are left out.
    """
    columns = _leading_columns(
        summary, [path for path in _settings(summary) if summary[path].nunique(dropna=False) > 1]
    )
    columns["final"] = _format_column(summary, "final_balanced_accuracy")
    columns["mean"] = _format_column(summary, "mean_balanced_accuracy")
    columns["gain"] = _format_column(summary, "gain", "+")
    columns["gain > 0"] = _wins(summary)
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _settings(summary: pd.DataFrame) -> list[str]:
    return list(summary.columns[: list(summary.columns).index("strategy_name")])


def _leading_columns(summary: pd.DataFrame, settings: list[str]) -> dict[str, list[str]]:
    names = short_names(_settings(summary))
    columns = {names[path]: [format_value(value) for value in summary[path].tolist()] for path in settings}
    return columns | {"strategy": summary["strategy"].tolist(), "seeds": list(map(str, summary["seeds"]))}


def _format_column(summary: pd.DataFrame, column: str, sign: str = "") -> list[str]:
    values = zip(summary[column], summary[f"{column}_sd"], strict=True)
    return [format_mean(mean, deviation, sign) for mean, deviation in values]


def _wins(summary: pd.DataFrame) -> list[str]:
    pairs = zip(summary["wins"], summary["pairs"], strict=True)
    return [f"{wins} of {pairs}" if pairs else NO_VALUE for wins, pairs in pairs]


def format_notes(report: Report) -> list[str]:
    """Return sentences about the reliability of the numbers."""
    seeds = report.summary["seeds"]
    notes = list(report.notes)
    if report.unfinished:
        verb = "is" if len(report.unfinished) == 1 else "are"
        notes.append(f"{count_runs(len(report.unfinished))} {verb} not finished; the table does not count them.")
    if seeds.min() != seeds.max():
        notes.append(f"Cells have different numbers of seeds ({seeds.min()} to {seeds.max()}).")
    if seeds.min() < MIN_SEEDS:
        notes.append(f"Fewer than {MIN_SEEDS} seeds are a smoke test: they are no evidence for a difference.")
    if BASELINE not in report.summary["strategy_name"].tolist():
        notes.append(f"The gain needs runs of the strategy {BASELINE}.")
    notes.append("No significance test was made.")
    return notes


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
    if "continued" in table and (continued := table[table["continued"]]["run"].nunique()):
        lines += ["", f"Runs that continued under another identity: {continued}; see `continued` in results.csv."]
    if report.unfinished:
        body = [[run.name, f"{run.num_rounds} of {run.planned_rounds}", run.error] for run in report.unfinished]
        lines += ["", "## Unfinished runs", "", *_markdown_table(["run", "finished rounds", "error"], body)]
    return "\n".join(lines) + "\n"


def _markdown_table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (header, *rows)]
    lines.insert(1, " | ".join(["---"] * len(header)))
    return [f"| {line} |" for line in lines]

"""Learning curves: a metric against the number of labels, one panel per combination of settings, bands over seeds."""

import io
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fishermask.results.files import write_atomically
from fishermask.results.tables import (
    BASELINE,
    METRICS,
    describe_settings,
    group_settings,
    rounds_to_show,
    setting_columns,
)

MAX_COLUMNS = 3
MAX_PANELS = 30
"""Maximum number of panels; a picture with more would be too large to open."""
PANEL_WIDTH, PANEL_HEIGHT = 4.6, 3.4
"""Size of a panel in inches."""
MIN_WIDTH = 6.4
DPI = 130

# Okabe and Ito (2008), for readers with any color vision; without yellow, which is too pale for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*")
LINE_STYLES = ("-", "-.", ":", (0, (6, 1)))
BASELINE_STYLE = {"color": "#7F7F7F", "marker": ".", "linestyle": "--"}
NAMES = ("fisher_mask", "margin", "bait", "badge", "coreset", "entropy", "least_confidence")
"""Strategies with a fixed style in all pictures. Other strategies and variants get the next styles, sorted by label."""


def style(number: int) -> dict[str, Any]:
    """Return color, marker and line style, which differ for all values of ``number`` below 77."""
    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    return {"color": color, "marker": marker, "linestyle": LINE_STYLES[number // len(COLORS) % len(LINE_STYLES)]}


def strategy_styles(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return the style of each strategy of a sweep by its label, in the order of labels."""
    names = table.drop_duplicates("strategy").set_index("strategy")["strategy_name"].sort_index()
    styles: dict[str, dict[str, Any]] = {}
    styled_names = set()
    next_number = len(NAMES)
    for label, name in names.items():
        number = NAMES.index(name) if name in NAMES and name not in styled_names else next_number
        if name == BASELINE and name not in styled_names:
            styles[str(label)] = BASELINE_STYLE
        else:
            styles[str(label)] = style(number)
            next_number += number == next_number
        styled_names.add(name)
    return styles


def draw(table: pd.DataFrame, metric: str, title: str) -> Figure:
    """Return the figure: lines are means over seeds, bands are one standard deviation to each side.

    The curves show finished runs. For a strategy and settings without a finished run, they show all its runs, and the
    legend says so.
    """
    styles = strategy_styles(table)
    table = rounds_to_show(table)
    settings, panels = setting_columns(table), group_settings(table)
    omitted = len(panels) - MAX_PANELS
    panels = panels[:MAX_PANELS]
    columns = 2 if len(panels) == 4 else min(MAX_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width = max(MIN_WIDTH, PANEL_WIDTH * columns)
    figure = Figure(figsize=(width, PANEL_HEIGHT * rows + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axis, (values, panel) in zip(axes, panels, strict=False):
        _draw_panel(axis, panel, metric, styles)
        if settings:
            panel_width = width / columns
            axis.set_title(_wrap(describe_settings(settings, values), panel_width, 10), fontsize=10)
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis in axes[: len(panels) : columns]:
        axis.set_ylabel(METRICS[metric])
    drawn = pd.concat([panel for _, panel in panels])
    seeds = drawn.groupby([*settings, "strategy", "labels"], dropna=False)["seed"].nunique()
    finished = drawn.groupby([*settings, "strategy"], dropna=False)["finished"].any().groupby(level="strategy")
    suffixes = {label: _describe_finished(cells.tolist()) for label, cells in finished}
    lines = [_wrap(title, width, 11), _describe_bands(seeds), *_describe_omitted(omitted)]
    figure.suptitle("\n".join(lines), fontsize=11)
    _add_legend(figure, axes[: len(panels)], {label: label + suffixes.get(label, "") for label in styles})
    return figure


def _draw_panel(axis: Axes, panel: pd.DataFrame, metric: str, styles: dict[str, dict[str, Any]]) -> None:
    # The baseline is drawn last, because its thin marks do not hide the other curves.
    for label in sorted(styles, key=lambda label: styles[label] == BASELINE_STYLE):
        curve = panel[panel["strategy"] == label].groupby("labels")[metric].agg(["mean", "std"])
        if curve.empty:
            continue
        axis.plot(curve.index, curve["mean"], markersize=4.5, linewidth=1.4, label=label, **styles[label])
        deviation = curve["std"].fillna(0)
        lower, upper = curve["mean"] - deviation, curve["mean"] + deviation
        axis.fill_between(curve.index, lower, upper, color=styles[label]["color"], alpha=0.12, linewidth=0)
    axis.set_xlabel("number of labels")
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _describe_bands(seeds: "pd.Series[int]") -> str:
    if seeds.max() == 1:
        return "one seed"
    count = f"{seeds.max()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    return f"mean over {count} seeds, band: ± 1 standard deviation"


def _describe_finished(cells: list[bool]) -> str:
    """Return the mark of a strategy in the legend.

    Args:
        cells: for each panel, whether a run of the strategy is finished.
    """
    if all(cells):
        return ""
    return " (unfinished in some panels)" if any(cells) else " (unfinished)"


def _describe_omitted(panels: int) -> list[str]:
    return [f"{panels} more combinations of settings are not drawn"] if panels > 0 else []


def _add_legend(figure: Figure, axes: Any, names: dict[str, str]) -> None:
    """Put a legend below the panels, with as many columns as fit into the figure.

    Args:
        names: text of each label.
    """
    lines: dict[str, Artist] = {}
    for axis in axes:
        lines |= {line.get_label(): line for line in axis.get_lines()}
    labels = [label for label in names if label in lines]
    texts = [_wrap(names[label], figure.get_figwidth() - 1, 9) for label in labels]
    for columns in range(min(5, len(labels)), 0, -1):
        legend = figure.legend(
            [lines[label] for label in labels],
            texts,
            loc="outside lower center",
            ncols=columns,
            fontsize=9,
            handlelength=3.5,
            frameon=False,
        )
        if columns == 1 or legend.get_window_extent().width <= 0.98 * figure.bbox.width:
            return
        legend.remove()


def _wrap(text: str, inches: float, points: float) -> str:
    """Break ``text`` into lines that fit into ``inches`` at a font size of ``points``."""
    # A letter of the default font is about 0.6 times as wide as the font size.
    return textwrap.fill(text, max(20, int(72 * inches / (0.6 * points))))


def save(figure: Figure, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write ``figure`` as PNG with ``metadata``, completely or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata=metadata)
    write_atomically(path, buffer.getvalue())

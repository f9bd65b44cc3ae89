"""Learning curves: a metric against the number of labels, one panel a setting, bands over seeds."""

import io
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fishermask.results.files import write_atomically
from fishermask.results.tables import setting_columns, text

COLUMNS = 3
COLORS = matplotlib.color_sequences["tab10"]


def panel_title(settings: list[str], values: tuple[object, ...]) -> str:
    """``ratio = 20, query = 40``: the last part of each dotted path and its value."""
    return ", ".join(f"{path.rpartition('.')[2]} = {text(value)}" for path, value in zip(settings, values, strict=True))


def draw(table: pd.DataFrame, metric: str, title: str) -> Figure:
    """The figure: line the mean over seeds, band one standard deviation to each side, points the measurements."""
    settings = setting_columns(table)
    panels = list(table.groupby(settings, dropna=False)) if settings else [((), table)]
    strategies = sorted(table["strategy"].unique())
    rows, columns = -(-len(panels) // COLUMNS), min(COLUMNS, len(panels))
    if len(panels) == 4:
        rows = columns = 2
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axis, (values, panel) in zip(axes, panels, strict=False):
        for i, strategy in enumerate(strategies):
            curve = panel[panel["strategy"] == strategy].groupby("labels")[metric].agg(["mean", "std"])
            if curve.empty:
                continue
            color = COLORS[i % len(COLORS)]
            axis.plot(curve.index, curve["mean"], "o-", markersize=3.5, color=color, label=strategy)
            spread = curve["std"].fillna(0)
            axis.fill_between(
                curve.index,
                curve["mean"] - spread,
                curve["mean"] + spread,
                color=color,
                alpha=0.15,
                linewidth=0,
            )
        if settings:
            axis.set_title(panel_title(settings, values), fontsize=10)
        axis.set_xlabel("labels")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.remove()
    for row in range(rows):
        axes[row * columns].set_ylabel(metric.replace("_", " "))
    handles: dict[str, Artist] = {}
    for axis in axes[: len(panels)]:
        lines, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    figure.suptitle(title)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(4, len(handles)))
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())

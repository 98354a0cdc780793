"""Tasks apart: bars by task at one budget, and tasks x methods as a coloured table."""

from typing import TYPE_CHECKING, Any

import numpy as np

from longfit.eval.cells import BASELINES
from longfit.eval.report.document import Picture
from longfit.eval.report.figure import BASELINE_LINES, SEQUENTIAL, Plot, colours, grid, marker_legend, new_figure
from longfit.eval.report.series import (
    ENDS,
    Condition,
    Row,
    Series,
    at_budget,
    budgets_of,
    by_series,
    counts,
    methods_of,
    shown_value,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def task_plots(condition: Condition) -> list[Plot]:
    """Two plots a budget."""
    plots = []
    for budget in budgets_of(condition.rows):
        rows = at_budget(condition.rows, budget)
        if methods_of(rows):
            plots += [_bars(condition, rows, budget), _heat_table(condition, rows, budget)]
    return plots


def plot_name(kind: str, budget: str, condition: Condition) -> str:
    """A file name in which the budget is spelled out: ``task-bars-25pct-model-4096``."""
    size = "".join(c if c.isalnum() or c == "." else "-" for c in budget.replace("%", "pct"))
    return f"{kind}-{size}{condition.suffix}"


def _bars(condition: Condition, rows: list[Row], budget: str) -> Plot:
    looks = colours(methods_of(condition.rows))
    series = [found for found in by_series(rows) if found.method not in BASELINES]
    percent = all(row["higher_is_better"] for row in rows)
    figure, panels = grid(len(condition.tasks), 4, 2.4, 0.16 * len(series) + 0.5, sharex=percent)
    for task, panel in zip(condition.tasks, panels, strict=True):
        _task_bars(panel, [row for row in rows if row["task"] == task], series, looks)
        panel.set_title(task, loc="left", fontweight="bold")
        panel.set_yticks(range(len(series)), [found.title for found in series], fontsize=6)
        panel.set_ylim(len(series) - 0.4, -0.6)
        if percent:
            panel.set_xlim(0, 102)
    figure.supxlabel("score, %" if percent else "score, % (nats a token for likelihood tasks)", fontsize=8)
    present = {row["method"] for row in rows}
    marker_legend(figure, [(n.replace("_", " "), BASELINE_LINES[n]) for n in BASELINES if n in present])
    each = counts(row for row in rows if row["task"] != "mean")
    caption = (
        f"{condition.title}, {budget} kept. Score with its 95 % interval, {each} a task; pale bars are question-aware; "
        "lines: full cache, truncation to the same size, no context."
    )
    title = f"Tasks at {budget}"
    return Plot(Picture(plot_name("task-bars", budget, condition), title, caption), figure)


def _task_bars(panel: "Axes", rows: list[Row], series: list[Series], looks: dict[str, tuple[str, str]]) -> None:
    found = {key: group[0] for key, group in by_series(rows).items()}
    for place, key in enumerate(series):
        if key not in found:
            continue
        row, colour = found[key], looks[key.method][0]
        value, low, high = (shown_value(row, row[name]) for name in ("score", "low", "high"))
        reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
        alpha = 0.45 if key.awareness == "aware" else 0.9
        panel.barh(place, value, height=0.78, color=colour, alpha=alpha, edgecolor=colour, linewidth=0.6)
        panel.errorbar(value, place, xerr=reach, color="#333333", elinewidth=0.7, linestyle="")
    for row in rows:
        if row["method"] in BASELINES:
            panel.axvline(shown_value(row, row["score"]), zorder=4, **BASELINE_LINES[row["method"]])


def _heat_table(condition: Condition, rows: list[Row], budget: str) -> Plot:
    groups = by_series(rows)
    tasks = [*condition.tasks, *(["mean"] if len(condition.tasks) > 1 and condition.means() else [])]
    scores = {(series, row["task"]): row for series, group in groups.items() for row in group}
    values = np.full((len(groups), len(tasks)), np.nan)
    for i, series in enumerate(groups):
        for j, task in enumerate(tasks):
            if row := scores.get((series, task)):
                values[i, j] = shown_value(row, row["score"])
    percent = [all(r["higher_is_better"] for (_, t), r in scores.items() if t == task) for task in tasks]
    shades = _shades(values, percent)
    figure = new_figure(1.8 + 0.52 * len(tasks), 1.4 + 0.2 * len(groups))
    panel = figure.subplots()
    panel.imshow(shades, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = "black" if shades[i, j] > 0.55 else "white"
            panel.text(
                j,
                i,
                f"{value:.0f}" if percent[j] else f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=6.5,
                color=ink,
            )
    panel.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", rotation_mode="anchor")
    panel.set_yticks(range(len(groups)), [series.title for series in groups])
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    if "mean" in tasks:
        panel.axvline(len(tasks) - 1.5, color="white", linewidth=3)
    below = sum(series.method in (*ENDS, "truncate") for series in groups)
    panel.axhline(below - 0.5, color="white", linewidth=3)
    each = counts(row for row in rows if row["task"] != "mean")
    unit = "Score in per cent" if all(percent) else "Score in per cent, or nats a token, shaded within its column"
    caption = f"{condition.title}, {budget} kept. {unit}, {each} a task; lighter is better."
    title = f"Tasks x methods at {budget}"
    return Plot(Picture(plot_name("task-table", budget, condition), title, caption), figure)


def _shades(values: Any, percent: list[bool]) -> Any:
    """0..1, higher is better: per cent as they are, others between their column's worst and best."""
    shades = values / 100
    for j, plain in enumerate(percent):
        if not plain:
            low, high = np.nanmin(values[:, j]), np.nanmax(values[:, j])
            shades[:, j] = (high - values[:, j]) / (high - low) if high > low else 1.0
    return shades

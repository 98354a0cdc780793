"""Quality against memory and time: a panel a method, and the Pareto fronts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from longfit.eval.cells import BASELINES
from longfit.eval.report.document import Picture
from longfit.eval.report.figure import BASELINE_LINES, FADED, Plot, colours, grid, marker_legend
from longfit.eval.report.series import (
    ENDS,
    MIB,
    Condition,
    Row,
    Series,
    by_series,
    counts,
    end,
    methods_of,
    pareto,
    series_of,
    shown_value,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation


def quality_label(rows: Sequence[Row]) -> str:
    return "score, %" if rows[0]["higher_is_better"] else "nats a token (lower is better)"


def quality_plot(condition: Condition) -> Plot | None:
    """Mean score against kept MiB, one panel a method over all others in grey; None without a compressed cell."""
    means = [row for row in condition.means() if row["kv_bytes"]]
    groups = {series: sorted(rows, key=_bytes) for series, rows in by_series(means).items()}
    methods = methods_of(means)
    if not methods:
        return None
    looks = colours(methods)
    figure, panels = grid(len(methods), 4, 2.4, 1.9)
    for method, panel in zip(methods, panels, strict=True):
        _background(panel, means, groups, method)
        variants = list(dict.fromkeys(series.variant for series in groups if series.method == method))
        for series, rows in groups.items():
            if series.method == method:
                _curve(panel, series, rows, looks[method][0], "osD^v"[variants.index(series.variant) % 5])
                if len(variants) > 1 and series.variant:
                    _end_label(panel, series.variant, rows, looks[method][0])
        panel.set_title(method, color=looks[method][0], fontweight="bold", loc="left")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.supxlabel("kept keys and values, MiB (log scale)", fontsize=8)
    figure.supylabel(quality_label(means), fontsize=8)
    marker_legend(figure, _quality_legend(means, groups))
    caption = (
        f"{condition.title}. Mean over {len(condition.tasks)} task(s) with its 95 % interval, {counts(means)} a cell; "
        "filled: the question was unknown at compression, open: it was known; grey: the other methods."
    )
    return Plot(Picture(f"quality-bytes{condition.suffix}", "Quality against kept bytes", caption), figure)


def _bytes(row: Row) -> float:
    return row["kv_bytes"]


def _background(panel: "Axes", means: Sequence[Row], groups: dict[Series, list[Row]], method: str) -> None:
    for series, rows in groups.items():
        x, y = [row["kv_bytes"] / MIB for row in rows], [shown_value(row, row["score"]) for row in rows]
        if series.method == "truncate":
            panel.plot(x, y, zorder=2, marker=".", **BASELINE_LINES["truncate"])
        elif series.method not in (*BASELINES, method):
            panel.plot(x, y, color=FADED, linewidth=0.6, zorder=1)
    for name in ENDS:
        if row := end(means, name):
            panel.axhline(shown_value(row, row["score"]), zorder=2, **BASELINE_LINES[name])


def _curve(panel: "Axes", series: Series, rows: Sequence[Row], colour: str, marker: str) -> None:
    aware = series.awareness == "aware"
    y = [shown_value(row, row["score"]) for row in rows]
    reach = [
        [max(0.0, value - shown_value(row, row["low"])) for row, value in zip(rows, y, strict=True)],
        [max(0.0, shown_value(row, row["high"]) - value) for row, value in zip(rows, y, strict=True)],
    ]
    panel.errorbar(
        [row["kv_bytes"] / MIB * (1.03 if aware else 1 / 1.03) for row in rows],
        y,
        yerr=reach,
        color=colour,
        marker=marker,
        markersize=4,
        markerfacecolor="white" if aware else colour,
        linewidth=1.2,
        linestyle=(0, (4, 1.5)) if aware else "-",
        elinewidth=0.8,
        zorder=4 if aware else 3,
    )


def _end_label(panel: "Axes", text: str, rows: Sequence[Row], colour: str) -> None:
    where = (rows[-1]["kv_bytes"] / MIB, shown_value(rows[-1], rows[-1]["score"]))
    panel.annotate(text, where, (0, 5), textcoords="offset points", ha="right", fontsize=6, color=colour)


def _quality_legend(means: Sequence[Row], groups: dict[Series, list[Row]]) -> list[tuple[str, dict[str, Any]]]:
    present = {row["method"] for row in means}
    ours: dict[str, Any] = {"color": BASELINE_LINES["full"]["color"], "marker": "o", "linewidth": 1, "markersize": 4}
    entries = [(name.replace("_", " "), BASELINE_LINES[name]) for name in BASELINES if name in present]
    if len(methods_of(means)) > 1:
        entries.append(("other methods", {"color": FADED, "linewidth": 1}))
    modes = {series.awareness for series in groups if series.method not in BASELINES}
    if "agnostic" in modes:
        entries.append(("question-agnostic", ours))
    if "aware" in modes:
        entries.append(("question-aware", ours | {"markerfacecolor": "white", "linestyle": (0, (4, 1.5))}))
    return entries


def pareto_plot(condition: Condition) -> Plot | None:
    """Quality against kept MiB and against the prefill ratio; points that nothing else beats are labelled."""
    means = [row for row in condition.means() if row["method"] != "no_context"]
    views = [
        (key, scale, label)
        for key, scale, label in (
            ("kv_bytes", MIB, "kept keys and values, MiB (log scale)"),
            ("prefill_ratio", 1, "prefill seconds / full cache (log scale)"),
        )
        if sum(bool(row[key]) for row in means if row["method"] not in BASELINES) > 0
    ]
    if not views:
        return None
    figure, panels = grid(len(views), 1, 7.6, 4.2, sharex=False)
    looks, labels = colours(methods_of(means)), []
    for panel, (key, scale, label) in zip(panels, views, strict=True):
        rows = [row for row in means if row[key]]
        points = [(row[key] / scale, shown_value(row, row["score"])) for row in rows]
        sign = 1 if means[0]["higher_is_better"] else -1
        front = pareto([(x, sign * y) for x, y in points])
        _scatter(panel, rows, points, looks, set(front))
        panel.step(
            *zip(*(points[i] for i in front), strict=True), where="post", color="#888888", linewidth=0.8, zorder=1
        )
        panel.set_xscale("log")
        low, high = min(x for x, _ in points), max(x for x, _ in points)
        margin = (high / low) ** 0.12 + 0.05
        panel.set_xlim(low / margin, high * margin)
        panel.margins(y=0.1)
        _plain_ticks(panel, low / margin, high * margin)
        panel.set_xlabel(label)
        panel.set_ylabel(quality_label(means))
        labels.append((panel, [(points[i], _point_name(rows[i])) for i in front], points))
    entries = [(name, {"color": c, "marker": m, "linestyle": "", "markersize": 5}) for name, (c, m) in looks.items()]
    marker_legend(
        figure, [*entries, ("truncate", {"color": "#555555", "marker": "x", "linestyle": "", "markersize": 5})]
    )
    # Places are judged in pixels, which exist only once the layout is settled.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for panel, names, points in labels:
        _label(panel, names, points)
    caption = (
        f"{condition.title}. Labelled: no other cell is at least as good for less. Open markers are question-aware; "
        f"the mean over {len(condition.tasks)} task(s), {counts(means)} a cell; intervals are in the "
        "tables; no context is left out."
    )
    return Plot(Picture(f"pareto{condition.suffix}", "Pareto fronts", caption), figure)


def _scatter(
    panel: "Axes",
    rows: Sequence[Row],
    points: Sequence[tuple[float, float]],
    looks: dict[str, tuple[str, str]],
    front: set[int],
) -> None:
    for i, (row, (x, y)) in enumerate(zip(rows, points, strict=True)):
        colour, marker = looks.get(row["method"], ("#555555", "x" if row["method"] == "truncate" else "_"))
        face = "none" if row["awareness"] == "aware" else colour
        look: dict[str, Any] = {"color": colour} if marker in "x_" else {"facecolor": face, "edgecolor": colour}
        panel.scatter([x], [y], s=34 if i in front else 18, marker=marker, linewidth=1, zorder=3, **look)


def _plain_ticks(panel: "Axes", low: float, high: float) -> None:
    """About five round numbers between the limits, also where they span less than a decade."""
    from matplotlib.ticker import NullLocator

    digits = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    round_numbers = [digit * 10.0**power for power in range(-4, 7) for digit in digits]
    inside = [value for value in round_numbers if low <= value <= high]
    panel.set_xticks(inside[:: max(1, len(inside) // 6)])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _point_name(row: Row) -> str:
    return row["method"] if row["method"] in ENDS else f"{series_of(row).title} {row['budget']}"


def _label(
    panel: "Axes", labels: Sequence[tuple[tuple[float, float], str]], points: Sequence[tuple[float, float]]
) -> None:
    """Each label at the nearest place to its point that hides no earlier label and, if it can be, no point."""
    from matplotlib.text import Text

    renderer = panel.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    dots = panel.transData.transform(points)
    taken: list[Any] = []
    for where, text in labels:
        best: tuple[int, Annotation, Any] | None = None
        for dx, dy in [
            (side * reach, up) for reach in (7, 16, 30) for up in (5, -9, 16, -20, 28, -32) for side in (-1, 1)
        ]:
            note = panel.annotate(
                text,
                where,
                (dx, dy),
                textcoords="offset points",
                fontsize=6.5,
                ha="right" if dx < 0 else "left",
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#888888", "shrinkB": 3},
            )
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer).padded(2)
            hidden = sum(box.overlaps(other) for other in taken) * 100
            hidden += sum(box.contains(x, y) for x, y in dots) * 3
            hidden += 50 * (not (panel.bbox.contains(box.x0, box.y0) and panel.bbox.contains(box.x1, box.y1)))
            if best is None or hidden < best[0]:
                if best is not None:
                    best[1].remove()
                best = (hidden, note, box)
            else:
                note.remove()
            if hidden == 0:
                break
        if best is not None:
            taken.append(best[2])

"""What each cell kept: layers x position, a panel a cell."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from longfit.errors import InputError
from longfit.eval.report.document import Picture
from longfit.eval.report.figure import SEQUENTIAL, Plot, grid
from longfit.eval.report.series import Condition, at_budget, budgets_of, series_of
from longfit.eval.report.task_plots import plot_name


def kept_plots(condition: Condition, kept: Sequence[dict[str, Any]]) -> list[Plot]:
    """A plot a budget, of the mean over the samples of each cell; none where the run stored no maps.

    Raises:
        InputError: maps of one cell differ in shape.
    """
    maps: dict[str, list[Any]] = defaultdict(list)
    for record in kept:
        if (record["model"], record["length"]) == (condition.model, condition.length):
            maps[record["cell"]].append(record["layers"])
    names = {row["cell"]: row for row in condition.rows}
    plots = []
    for budget in budgets_of(row for cell, row in names.items() if cell in maps):
        rows = [row for row in at_budget(names.values(), budget) if row["cell"] in maps and row["budget"] == budget]
        figure, panels = grid(len(rows), 4, 2.3, 1.5)
        for panel, row in zip(panels, rows, strict=True):
            values = _mean(row["cell"], maps[row["cell"]])
            image = panel.imshow(
                values,
                cmap=SEQUENTIAL,
                vmin=0,
                vmax=100,
                aspect="auto",
                interpolation="nearest",
                extent=(0, 100, len(values) - 0.5, -0.5),
            )
            panel.set_title(series_of(row).title, loc="left", fontsize=7)
        figure.supxlabel("position in the context, %", fontsize=8)
        figure.supylabel("layer", fontsize=8)
        figure.colorbar(image, ax=panels, label="entries kept, % of heads x tokens", shrink=0.8, aspect=30)
        counts = sorted({len(maps[row["cell"]]) for row in rows})
        n = f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")
        caption = f"{condition.title}, {budget} kept. Mean over {n} samples a cell, layer 0 is nearest the input."
        picture = Picture(plot_name("kept", budget, condition), f"Kept tokens at {budget}", caption)
        plots.append(Plot(picture, figure))
    return plots


def _mean(cell: str, found: Sequence[Any]) -> Any:
    """[layer, bin] in per cent."""
    if len({(len(layers), len(layers[0])) for layers in found}) > 1:
        raise InputError(
            f"the kept maps of cell {cell!r} differ in layers or bins; remove kept*.jsonl or its odd lines"
        )
    return np.asarray(found, dtype=float).mean(axis=0)

"""Where needles are found: depth x length for every method, or depth x method where a run has one length."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from longfit.eval.report.document import Picture
from longfit.eval.report.figure import SEQUENTIAL, Plot, grid
from longfit.eval.report.series import ENDS, Condition, budgets_of, by_series
from longfit.eval.report.task_plots import plot_name

BINS = 10
Scores = dict[tuple[int, int], list[float]]


def needle_plots(records: Sequence[dict[str, Any]]) -> list[Plot]:
    """A plot a model and budget, of the samples whose details give the needle's depth in 0..1."""
    by_model: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if isinstance((record.get("details") or {}).get("depth"), int | float):
            by_model[record["model"]].append(record)
    plots = []
    for model, found in by_model.items():
        suffix = f"-{model.replace('/', '-')}" if len(by_model) > 1 else ""
        for budget in budgets_of(found):
            chosen = [record for record in found if record["budget"] == budget or record["method"] in ENDS]
            plots.append(_plot(chosen, model, budget, suffix))
    return plots


def _plot(records: Sequence[dict[str, Any]], model: str, budget: str, suffix: str) -> Plot:
    lengths = sorted({record["length"] for record in records})
    groups = by_series(records)
    if len(lengths) > 1:
        maps = {series: _map(group, lengths) for series, group in groups.items()}
        figure, panels = grid(len(maps), 5, 1.7, 1.6)
        for panel, (series, values) in zip(panels, maps.items(), strict=True):
            image = _draw(panel, values)
            panel.set_title(series.title, loc="left", fontsize=7)
            panel.set_xticks(range(len(lengths)), [_short(length) for length in lengths], rotation=45)
        figure.supxlabel("context length, tokens", fontsize=8)
    else:
        figure, panels = grid(1, 1, 1.6 + 0.3 * len(groups), 3.2)
        image = _draw(panels[0], np.hstack([_map(group, lengths) for group in groups.values()]))
        names = [series.title for series in groups]
        panels[0].set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    figure.supylabel("depth of the needle, %", fontsize=8)
    figure.colorbar(image, ax=panels, label="score, %", shrink=0.8, aspect=30)
    each = len(records) / max(1, len(groups) * len(lengths))
    caption = (
        f"{model}, {', '.join(f'{length:,}' for length in lengths)} tokens, {budget} kept. Mean score by the needle's "
        f"depth (0 the beginning), n = {each:.0f} a method and length over {BINS} depths; white: no sample."
    )
    condition = Condition(model, lengths[0], suffix, ())
    return Plot(Picture(plot_name("needle", budget, condition), f"Needles by depth at {budget}", caption), figure)


def _map(records: Sequence[dict[str, Any]], lengths: Sequence[int]) -> Any:
    """Mean score in per cent, [depth bin, length], NaN where there is no sample."""
    scores: Scores = defaultdict(list)
    for record in records:
        depth = min(BINS - 1, max(0, int(record["details"]["depth"] * BINS)))
        scores[depth, lengths.index(record["length"])].append(record["score"])
    values = np.full((BINS, len(lengths)), np.nan)
    for place, found in scores.items():
        values[place] = 100 * sum(found) / len(found)
    return values


def _draw(panel: Any, values: Any) -> Any:
    panel.set_yticks([-0.5, BINS / 2 - 0.5, BINS - 0.5], ["0", "50", "100"])
    panel.tick_params(length=2)
    return panel.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=100, aspect="auto", interpolation="nearest")


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"

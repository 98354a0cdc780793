"""Perplexity against position, for runs that scored the tokens of a continuation."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from longfit.eval.cells import BASELINES
from longfit.eval.report.document import Picture
from longfit.eval.report.figure import BASELINE_LINES, Plot, colours, grid, marker_legend
from longfit.eval.report.series import ENDS, Condition, budgets_of, by_series, methods_of
from longfit.eval.report.task_plots import plot_name

BINS = 16


def position_plots(condition: Condition, records: Sequence[dict[str, Any]]) -> list[Plot]:
    """A plot a budget; none where no sample has ``nll_by_position``."""
    found = [
        record
        for record in records
        if record.get("nll_by_position") and (record["model"], record["length"]) == (condition.model, condition.length)
    ]
    plots = []
    for budget in budgets_of(found):
        chosen = [record for record in found if record["budget"] == budget or record["method"] in ENDS]
        if methods_of(chosen):
            plots.append(_plot(condition, chosen, budget))
    return plots


def _plot(condition: Condition, records: Sequence[dict[str, Any]], budget: str) -> Plot:
    curves = {
        series: perplexity_by_position([r["nll_by_position"] for r in rows])
        for series, rows in by_series(records).items()
    }
    methods, looks = methods_of(records), colours(methods_of(condition.rows))
    figure, panels = grid(len(methods), 4, 2.4, 1.8)
    for method, panel in zip(methods, panels, strict=True):
        for series, values in curves.items():
            x = (np.arange(len(values)) + 0.5) * 100 / len(values)
            if series.method in BASELINES:
                panel.plot(x, values, **BASELINE_LINES[series.method])
            elif series.method == method:
                aware = series.awareness == "aware"
                panel.plot(x, values, color=looks[method][0], linestyle=(0, (4, 1.5)) if aware else "-", linewidth=1.4)
        panel.set_title(method, color=looks[method][0], fontweight="bold", loc="left")
    figure.supxlabel("position in the scored tokens, %", fontsize=8)
    figure.supylabel("perplexity", fontsize=8)
    present = {record["method"] for record in records}
    marker_legend(figure, [(n.replace("_", " "), BASELINE_LINES[n]) for n in BASELINES if n in present])
    n = len({record["sample"] for record in records})
    caption = (
        f"{condition.title}, {budget} kept. exp of the mean negative log-likelihood over n = {n} samples; dashed: the "
        "question was known at compression."
    )
    picture = Picture(plot_name("perplexity", budget, condition), f"Perplexity by position at {budget}", caption)
    return Plot(picture, figure)


def perplexity_by_position(samples: Sequence[Sequence[float]]) -> Any:
    """exp of the mean of nats by relative position, in at most 16 bins, fewer where samples are shorter."""
    bins = min(BINS, *(len(values) for values in samples)) if len(samples) > 1 else min(BINS, len(samples[0]))
    places: dict[int, list[float]] = defaultdict(list)
    for values in samples:
        for i, value in enumerate(values):
            places[i * bins // len(values)].append(value)
    return np.exp([np.mean(places[i]) for i in range(bins)])

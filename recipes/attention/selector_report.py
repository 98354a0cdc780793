"""Tables and the plot of `selector_recall.py`, from its samples."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from longfit.eval.intervals import bootstrap_mean

OURS = "hadamard_topk (ours)"
COLOURS = ("#222222", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#888888")


def report(samples: Path, folder: Path, how: dict[str, Any]) -> None:
    """Write summary.json, table.md, layers.csv and recall.png into the folder."""
    with samples.open() as lines:
        rows = [
            {**row, "budget": int(row["budget"]), "layer": int(row["layer"])}
            | {key: float(row[key]) for key in ("mass", "error", "read_bytes", "full_bytes")}
            for row in csv.DictReader(lines)
        ]
    figures = summary(rows)
    differences = paired(rows)
    (folder / "summary.json").write_text(
        json.dumps({"how": how, "figures": figures, "ours_minus": differences}, indent=1) + "\n"
    )
    (folder / "table.md").write_text(table(figures) + "\n" + difference_table(differences))
    with (folder / "layers.csv").open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("model", "layer", "budget", "selector", "mass", "error"))
        for (model, layer, budget, selector), group in grouped(rows, "model", "layer", "budget", "selector").items():
            values = (f"{mean(row[key] for row in group):.4f}" for key in ("mass", "error"))
            writer.writerow((model, layer, budget, selector, *values))
    plot(figures, folder / "recall.png")


def grouped(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def by(rows: list[dict], what: str, key: str = "mass") -> dict[Any, float]:
    return {name: mean(row[key] for row in group) for (name,), group in grouped(rows, what).items()}


def summary(rows: list[dict]) -> list[dict]:
    """Mean over layers and texts of mass and error with intervals, and the share of the full bytes read."""
    found = []
    for (model, selector, budget), group in grouped(rows, "model", "selector", "budget").items():
        figure = {"model": model, "selector": selector, "budget": budget, "texts": len({r["text"] for r in group})}
        for key in ("mass", "error"):
            values = list(by(group, "text", key).values())
            figure[key] = mean(values)
            figure[f"{key}_low"], figure[f"{key}_high"] = bootstrap_mean(values)
        figure["read_share"] = mean(row["read_bytes"] / row["full_bytes"] for row in group)
        figure["read_bytes_per_layer"] = round(mean(row["read_bytes"] for row in group))
        found.append(figure)
    return found


def paired(rows: list[dict]) -> list[dict]:
    """Ours less each other, text by text; and in how many layers ours keeps more mass."""
    found = []
    cells = grouped(rows, "model", "selector", "budget")
    for (model, selector, budget), group in cells.items():
        if selector == OURS:
            continue
        ours = cells[model, OURS, budget]
        mine, theirs = by(ours, "text"), by(group, "text")
        gaps = [mine[text] - theirs[text] for text in theirs]
        low, high = bootstrap_mean(gaps)
        mine, theirs = by(ours, "layer"), by(group, "layer")
        better = [mine[layer] > theirs[layer] for layer in theirs]
        found.append(
            {"model": model, "other": selector, "budget": budget, "gap": mean(gaps), "low": low, "high": high}
            | {"layers_won": sum(better), "layers": len(better)}
        )
    return found


def table(figures: list[dict]) -> str:
    lines = []
    for (model,), of_model in grouped(figures, "model").items():
        budgets = sorted({figure["budget"] for figure in of_model})
        lines += [f"\n{model}: attention mass kept [95 % interval] / relative output error / share of bytes read\n"]
        lines += heading("selector", budgets)
        for (selector,), group in grouped(of_model, "selector").items():
            cells = {
                f["budget"]: f"{f['mass']:.3f} [{f['mass_low']:.3f}, {f['mass_high']:.3f}] / {f['error']:.3f} / "
                f"{f['read_share']:.1%}"
                for f in group
            }
            lines.append(f"| {selector} | " + " | ".join(cells[b] for b in budgets) + " |")
    return "\n".join(lines).lstrip() + "\n"


def difference_table(differences: list[dict]) -> str:
    lines = []
    for (model,), of_model in grouped(differences, "model").items():
        budgets = sorted({d["budget"] for d in of_model})
        lines += [f"\n{model}: mass of {OURS} less the other's [95 % interval, paired by text]; layers that it wins\n"]
        lines += heading("other", budgets)
        for (other,), group in grouped(of_model, "other").items():
            cells = {
                d["budget"]: f"{d['gap']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]; {d['layers_won']}/{d['layers']}"
                for d in group
            }
            lines.append(f"| {other} | " + " | ".join(cells[b] for b in budgets) + " |")
    return "\n".join(lines) + "\n"


def heading(first: str, budgets: list[int]) -> list[str]:
    return [f"| {first} | " + " | ".join(f"{b} tokens" for b in budgets) + " |", "|---" * (len(budgets) + 1) + "|"]


def plot(figures: list[dict], file: Path) -> None:
    """Mass (above) and error (below) against the budget, a column a model."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(figure["model"] for figure in figures))
    selectors = list(dict.fromkeys(figure["selector"] for figure in figures))
    canvas = Figure(figsize=(4.2 * len(models), 6.4), layout="constrained")
    panels = canvas.subplots(2, len(models), squeeze=False, sharex=True)
    for column, model in enumerate(models):
        for row, (key, label) in enumerate((("mass", "attention mass kept"), ("error", "relative output error"))):
            panel = panels[row][column]
            for i, selector in enumerate(selectors):
                points = sorted(
                    (f for f in figures if f["model"] == model and f["selector"] == selector), key=lambda f: f["budget"]
                )
                middle = [f[key] for f in points]
                ends = [[f[key] - f[f"{key}_low"] for f in points], [f[f"{key}_high"] - f[key] for f in points]]
                panel.errorbar(
                    [f["budget"] for f in points],
                    middle,
                    yerr=ends,
                    label=selector,
                    color=COLOURS[i % len(COLOURS)],
                    marker="osD^vP"[i % 6],
                    markersize=4,
                    linewidth=1.2,
                    capsize=2.5,
                    linestyle="--" if i in (0, len(selectors) - 1) else "-",
                )
            panel.set_xscale("log", base=2)
            panel.set_xticks([f["budget"] for f in points], [str(f["budget"]) for f in points])
            panel.set_ylabel(label)
            panel.grid(alpha=0.25)
        panels[0][column].set_title(model)
        panels[1][column].set_xlabel("stored tokens attended to in a step")
    panels[0][0].legend(fontsize=7, frameon=False)
    canvas.savefig(file, dpi=140)

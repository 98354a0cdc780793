"""Tables and figures of docs/attention/quality.md, from the runs of the recipes in this folder.

    python recipes/attention/quality_report.py runs -o docs/attention/quality

RUNS holds the run folders by the recipes' names; those that are absent are left out.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from longfit.eval.intervals import bootstrap_mean, mean_interval, paired_difference, stratified_mean
from longfit.eval.records import read_records

Record = dict[str, Any]
Cell = tuple[str, str]  # name as shown, size as shown
RECIPES = ("selectors-needle", "selectors-ruler", "selectors-perplexity", "patterns-needle", "patterns-ruler")
RECIPES += ("patterns-perplexity", "beyond-window-needle", "beyond-window")
OURS = "hadamard_topk (ours)"
SELECTORS = {
    "exact top-k (oracle)": ("#222222", "o"),
    OURS: ("#D55E00", "s"),
    "adamas, calibrated": ("#0072B2", "D"),
    "adamas, as published": ("#56B4E9", "^"),
    "quest": ("#009E73", "v"),
    "sinks and recent": ("#888888", "P"),
}
CURVES = ("#222222", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#888888", "#E69F00", "#7570B3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = {name: read_records(options.runs / name) for name in RECIPES if (options.runs / name).is_dir()}
    text = []
    for name in ("selectors-needle", "selectors-ruler"):
        if runs.get(name):
            text += [f"## {name}\n", score_tables(runs[name], selector_cell), ours_less_others(runs[name])]
            text += [agreement_tables(runs[name], selector_cell)]
    if runs.get("selectors-perplexity"):
        text += ["## selectors-perplexity\n", nats_tables(runs["selectors-perplexity"], selector_cell)]
        text += [ours_less_others(runs["selectors-perplexity"])]
    for name in ("patterns-needle", "patterns-ruler", "beyond-window-needle"):
        if runs.get(name):
            text += [f"## {name}\n", score_tables(runs[name], pattern_cell)]
    if runs.get("patterns-perplexity"):
        text += ["## patterns-perplexity\n", nats_tables(runs["patterns-perplexity"], pattern_cell)]
    if runs.get("beyond-window"):
        text += ["## beyond-window\n", positions_table(runs["beyond-window"])]
        positions_plot(runs["beyond-window"], options.out / "beyond-window.png")
    (options.out / "tables.md").write_text("\n".join(text))
    selectors_plot(runs.get("selectors-needle", []), runs.get("selectors-perplexity", []), options.out)


# -- cells ------------------------------------------------------------------------------------------------------------


def selector_cell(record: Record) -> Cell:
    """The selector as it is called in the tables, and its tokens; a baseline has no tokens."""
    method, options = record["method"], record["options"]
    size = record["budget"].removesuffix(" read") if record["budget"].endswith(" read") else ""
    if method == "topk":
        return ("sinks and recent" if options.get("recent_tokens") else "exact top-k (oracle)"), size
    if method == "adamas":
        return ("adamas, calibrated" if options.get("thresholds") == "calibrated" else "adamas, as published"), size
    return (OURS if method == "hadamard_topk" else method), size


def pattern_cell(record: Record) -> Cell:
    """The patch with the options that tell it apart, and its tokens."""
    options = ", ".join(f"{key}={value}" for key, value in record["options"].items())
    size = record["budget"].removesuffix(" read") if record["budget"].endswith(" read") else ""
    return (f"{record['method']}, {options}" if options else record["method"]), size


def grouped(
    records: Sequence[Record], name: Callable[[Record], Cell]
) -> dict[tuple[str, int], dict[Cell, list[Record]]]:
    """(model, length) -> cell -> its records."""
    found: dict[tuple[str, int], dict[Cell, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        found[record["model"], record["length"]][name(record)].append(record)
    return found


def by_task(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for record in records:
        found[record["task"]][record["sample"]] = float(record["score"])
    return found


def mean_of(records: Sequence[Record]) -> tuple[float, float, float]:
    """Mean over tasks and its interval."""
    tasks = [list(values.values()) for values in by_task(records).values()]
    if len(tasks) == 1:
        return mean_interval(tasks[0])
    everything = [value for values in tasks for value in values]
    if len(set(everything)) == 1 or (len({len(t) for t in tasks}) == 1 and set(everything) <= {0, 1}):
        return mean_interval(everything)  # as many right-or-wrong samples a task: Wilson's, over all
    return stratified_mean({str(i): values for i, values in enumerate(tasks)})


def difference(ours: Sequence[Record], theirs: Sequence[Record]) -> tuple[float, float, float, int]:
    """Paired over the samples that both have, and how many they are."""
    mine, other = ({r["sample"]: float(r["score"]) for r in given} for given in (ours, theirs))
    both = sorted(mine.keys() & other.keys())
    a, b = [mine[s] for s in both], [other[s] for s in both]
    if set(a) | set(b) <= {0, 1}:
        return *paired_difference(a, b), len(both)
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    return sum(gaps) / len(gaps), *bootstrap_mean(gaps), len(both)


def sizes_of(cells: dict[Cell, list[Record]]) -> list[str]:
    return sorted({size for _, size in cells if size}, key=int)


def names_of(cells: dict[Cell, list[Record]], sized: bool) -> list[str]:
    """Names in the order of the legend, then as they come."""
    found = dict.fromkeys(name for name, size in cells if bool(size) == sized)
    return [*(n for n in SELECTORS if n in found), *(n for n in found if n not in SELECTORS)]


def title(model: str, length: int, cells: dict[Cell, list[Record]]) -> str:
    tasks = {task: len(values) for task, values in by_task(next(iter(cells.values()))).items()}
    return f"{model}, {length:,} tokens; " + ", ".join(f"{task} n = {n}" for task, n in tasks.items())


# -- tables -----------------------------------------------------------------------------------------------------------


def score_tables(records: Sequence[Record], name: Callable[[Record], Cell]) -> str:
    """Scores in per cent with their intervals."""

    def shown(group: Sequence[Record]) -> str:
        score, low, high = mean_of(group)
        return f"{100 * score:.0f} [{100 * low:.0f}, {100 * high:.0f}]"

    return _tables(records, name, shown, "per cent right")


def agreement_tables(records: Sequence[Record], name: Callable[[Record], Cell]) -> str:
    """How often the answer is full attention's own, word for word, right or wrong."""
    full = {
        (r["model"], r["length"], r["sample"]): r["answer"] for r in records if r["method"] == "full"
    }  # the baseline's answer

    def shown(group: Sequence[Record]) -> str:
        same = [float(r["answer"] == full[r["model"], r["length"], r["sample"]]) for r in group]
        share, low, high = mean_interval(same)
        return f"{100 * share:.0f} [{100 * low:.0f}, {100 * high:.0f}]"

    return _tables(records, name, shown, "per cent with the same answer as full attention")


def nats_tables(records: Sequence[Record], name: Callable[[Record], Cell]) -> str:
    """Nats above full attention, paired by text, with their intervals."""
    full = {
        (r["model"], r["length"], r["sample"]): float(r["score"]) for r in records if r["method"] == "full"
    }  # the baseline of each sample

    def shown(group: Sequence[Record]) -> str:
        if group[0]["method"] == "full":
            return f"{sum(r['score'] for r in group) / len(group):.3f} nats"
        gaps = [r["score"] - full[r["model"], r["length"], r["sample"]] for r in group]
        if len(gaps) == 1:
            return f"{gaps[0]:+.3f}"
        low, high = bootstrap_mean(gaps)
        return f"{sum(gaps) / len(gaps):+.3f} [{low:+.3f}, {high:+.3f}]"

    return _tables(records, name, shown, "nats above full attention")


def _tables(
    records: Sequence[Record], name: Callable[[Record], Cell], shown: Callable[[Sequence[Record]], str], what: str
) -> str:
    lines = []
    for (model, length), cells in grouped(records, name).items():
        sizes = sizes_of(cells)
        lines += [f"{title(model, length, cells)}: {what}\n"]
        lines += ["| | " + " | ".join(f"{size} tokens" for size in sizes) + " |", "|---" + "|--:" * len(sizes) + "|"]
        for cell in names_of(cells, sized=True):
            row = [shown(cells[cell, size]) if (cell, size) in cells else "" for size in sizes]
            lines.append(f"| {cell} | " + " | ".join(row) + " |")
        lines += ["", "| | |", "|---|--:|"]
        lines += [f"| {cell} | {shown(cells[cell, ''])} |" for cell in names_of(cells, sized=False)]
        lines.append("")
    return "\n".join(lines)


def ours_less_others(records: Sequence[Record]) -> str:
    """Paired differences, sample by sample."""
    lines = []
    percent = 100 if records[0]["higher_is_better"] else 1
    for (model, length), cells in grouped(records, selector_cell).items():
        sizes = sizes_of(cells)
        lines += [f"{title(model, length, cells)}: {OURS} less the other, paired\n"]
        lines += ["| | " + " | ".join(f"{size} tokens" for size in sizes) + " |", "|---" + "|--:" * len(sizes) + "|"]
        rows = [(other, [(OURS, size, other, size) for size in sizes]) for other in names_of(cells, True)]
        rows.append(("full", [(OURS, size, "full", "") for size in sizes]))
        for other, pairs in rows:
            if other == OURS:
                continue
            shown = []
            for ours, size, theirs, their_size in pairs:
                if not cells.get((ours, size)) or not cells.get((theirs, their_size)):
                    shown.append("")
                    continue
                gap, low, high, _ = difference(cells[ours, size], cells[theirs, their_size])
                digits = 0 if percent == 100 else 3
                gap, low, high = (percent * value for value in (gap, low, high))
                shown.append(f"{gap:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")
            lines.append(f"| {other} | " + " | ".join(shown) + " |")
        lines.append("")
    return "\n".join(lines)


def stretches(records: Sequence[Record]) -> list[float]:
    """Perplexity of each stretch of the targets: exp of the mean of nats over the texts."""
    columns = zip(*(r["nll_by_position"] for r in records), strict=True)
    return [math.exp(sum(column) / len(records)) for column in columns]


def positions_table(records: Sequence[Record]) -> str:
    """Perplexity by stretch of the targets."""
    lines = []
    for (model, length), cells in grouped(records, pattern_cell).items():
        edges = edges_of(next(iter(cells.values())))
        lines += [f"{title(model, length, cells)}: perplexity by position\n"]
        lines += ["| | tokens | " + " | ".join(f"to {edge:,}" for edge in edges[1:]) + " |"]
        lines += ["|---|--:" + "|--:" * (len(edges) - 1) + "|"]
        for (name, size), group in cells.items():
            lines.append(f"| {name} | {size} | " + " | ".join(f"{value:.1f}" for value in stretches(group)) + " |")
        lines.append("")
    return "\n".join(lines)


def edges_of(records: Sequence[Record]) -> list[int]:
    """Positions in the input at which the stretches begin and end."""
    first, parts = records[0], len(records[0]["nll_by_position"])
    start, targets = first["context_tokens"] + first["question_tokens"], first["details"]["target_tokens"]
    return [start + round(i * targets / parts) for i in range(parts + 1)]


# -- figures ----------------------------------------------------------------------------------------------------------


def selectors_plot(needles: Sequence[Record], texts: Sequence[Record], folder: Path) -> None:
    """Needles found (above) and nats lost (below) against the tokens read, a column a model."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(r["model"] for r in [*needles, *texts]))
    if not models:
        return
    canvas = Figure(figsize=(4.6 * len(models), 6.6), layout="constrained")
    panels = canvas.subplots(2, len(models), squeeze=False, sharex=True)
    for column, model in enumerate(models):
        for row, (records, label) in enumerate(((needles, "needles found, %"), (texts, "nats above full attention"))):
            panel = panels[row][column]
            own = [r for r in records if r["model"] == model]
            if own:
                _curves(panel, own, scored=row == 0)
            else:
                panel.text(0.5, 0.5, "not run", ha="center", va="center", transform=panel.transAxes)
            panel.set_ylabel(label)
            panel.grid(alpha=0.25)
        panels[0][column].set_title(model)
        panels[1][column].set_xlabel("stored tokens attended to in a step")
        panels[0][column].set_ylim(-4, 104)
    handles, labels = panels[0][0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    canvas.savefig(folder / "selectors.png", dpi=140)


def _curves(panel: Any, records: Sequence[Record], scored: bool) -> None:
    ((_, cells),) = grouped(records, selector_cell).items()
    full = {r["sample"]: float(r["score"]) for r in cells["full", ""]}
    sizes = sizes_of(cells)
    for place, (name, (colour, marker)) in enumerate(SELECTORS.items()):
        points = []
        for size in sizes:
            group = cells.get((name, size))
            if not group:
                continue
            if scored:
                points.append((int(size), *(100 * value for value in mean_of(group))))
            else:
                gaps = [r["score"] - full[r["sample"]] for r in group]
                points.append((int(size), sum(gaps) / len(gaps), *bootstrap_mean(gaps)))
        if not points:
            continue
        shift = 1.025 ** (place - 2.5)  # so that error bars stand side by side
        panel.errorbar(
            [x * shift for x, *_ in points],
            [y for _, y, _, _ in points],
            yerr=[[max(0, y - low) for _, y, low, _ in points], [max(0, high - y) for _, y, _, high in points]],
            label=name,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
            linestyle="--" if name.startswith(("exact", "sinks")) else "-",
        )
    if scored:
        panel.axhline(
            100 * mean_of(cells["full", ""])[0], color="#BBBBBB", linewidth=1, zorder=0, label="full attention"
        )
    else:
        panel.axhline(0, color="#BBBBBB", linewidth=1, zorder=0)
        panel.set_yscale("symlog", linthresh=0.02)
        panel.set_ylim(bottom=-0.015)
    panel.set_xscale("log", base=2)
    panel.set_xticks([int(size) for size in sizes], sizes)


def positions_plot(records: Sequence[Record], file: Path) -> None:
    """Perplexity against the position in the input, a line a cell."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7.2, 4.2), layout="constrained")
    panel = canvas.subplots()
    ((_, cells),) = grouped(records, pattern_cell).items()
    edges = edges_of(next(iter(cells.values())))
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    for place, ((name, size), group) in enumerate(cells.items()):
        label = f"{name}, {size} tokens" if size else name
        style = "--" if name == "full" else "-"
        panel.plot(middles, stretches(group), style, color=CURVES[place % len(CURVES)], marker=".", label=label)
    panel.set_yscale("log")
    panel.set_xlabel("position in the input, tokens")
    panel.set_ylabel("perplexity")
    panel.grid(alpha=0.25, which="both")
    panel.legend(fontsize=7, frameon=False)
    canvas.savefig(file, dpi=140)


if __name__ == "__main__":
    main()

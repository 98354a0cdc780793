"""A run on paper: its table as JSON, CSV and Markdown, its loss curves as PNG."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longfit.training.files import write_whole
from longfit.training.metrics import LOG

STEM, CURVES = "evaluation", "losses.png"
NAMES = {"no_context": "no context", "shuffled": "another's memory", "truncation": "truncation, equal slots"}


def write_table(rows: Sequence[dict[str, Any]], folder: Path) -> str:
    """evaluation.json, .csv and .md in a run's folder; returns the Markdown."""
    text = markdown(rows)
    write_whole(folder / f"{STEM}.json", json.dumps(list(rows), indent=1) + "\n")
    write_whole(folder / f"{STEM}.csv", _csv(rows))
    write_whole(folder / f"{STEM}.md", text)
    return text


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each set and condition."""
    lines = [
        "| set | tokens → slots | metric | | score (95 %) | normalised (95 %) | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        score = f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        normal = "" if row["normalised"] is None else _normal(row)
        lines.append(
            f"| {row['set']} | {row['context_tokens']} → {row['slots']} | {row['metric']} | "
            f"{NAMES.get(row['condition'], row['condition'])} | {score} | {normal} | {row['n']} |"
        )
    return "\n".join(lines) + "\n"


def _normal(row: dict[str, Any]) -> str:
    return f"{row['normalised']:.2f} ({row['normalised_low']:.2f} to {row['normalised_high']:.2f})"


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_curves(folder: Path) -> Path | None:
    """losses.png from metrics.jsonl; None, and a line on stderr, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no loss curves: matplotlib is not installed (pip install 'longfit[eval]')", file=sys.stderr)
        return None
    log = folder / LOG
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    steps = [line for line in lines if "loss" in line]
    if not steps:
        return None
    other = {"step", "lr", "grad_norm", "context_tokens", "ratio", "seconds"}
    names = list(dict.fromkeys(name for line in steps for name in line if name not in other))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(line["step"], line[name]) for line in steps if name in line]
        axes.plot(*zip(*points, strict=True), label=name, alpha=0.35, color=f"C{names.index(name)}")
        axes.plot(*zip(*_smooth(points), strict=True), color=f"C{names.index(name)}")
    axes.set(xlabel="step", ylabel="nats", title=folder.name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder / CURVES, dpi=120)
    return folder / CURVES


def _smooth(points: Sequence[tuple[int, float]], width: int = 10) -> list[tuple[int, float]]:
    """The mean of the last `width` points at each."""
    return [
        (step, sum(value for _, value in points[max(0, i - width + 1) : i + 1]) / min(width, i + 1))
        for i, (step, _) in enumerate(points)
    ]

"""From samples to medians, ratios, verdicts and a Markdown table: pure functions."""

import statistics
from typing import Any

from longfit.bench.recipe import Recipe, Target

Samples = dict[tuple[str, int, int], dict[str, Any]]

METRICS = (
    "prefill_seconds",
    "decode_seconds_per_token",
    "score_share",
    "extra_peak_bytes",
    "peak_bytes",
    "kv_bytes",
    "kept_tokens",
)
RATIO_METRICS = ("prefill_seconds", "decode_seconds_per_token", "extra_peak_bytes", "peak_bytes", "kv_bytes")
TITLES = {
    "prefill_seconds": "prefill s",
    "decode_seconds_per_token": "decode ms/token",
    "score_share": "scoring share",
    "extra_peak_bytes": "extra peak MiB",
    "peak_bytes": "peak MiB",
    "kv_bytes": "KV MiB",
    "kept_tokens": "kept tokens",
}
SCALES = {
    "decode_seconds_per_token": 1e3,
    "extra_peak_bytes": 2**-20,
    "peak_bytes": 2**-20,
    "kv_bytes": 2**-20,
}


def summarise(recipe: Recipe, samples: Samples) -> dict[str, Any]:
    """Rows with medians, minima and ratios to the baseline, the targets' verdicts, and what is missing."""
    rows = [_row(system, length, samples) for length in recipe.lengths for system in recipe.systems_at(length)]
    found = {(row["system"], row["length"]): row for row in rows}
    for row in rows:
        base = found.get((recipe.baseline, row["length"]))
        row["ratios"] = {} if base is None else _ratios(row, base)
    return {
        "name": recipe.name,
        "measure": recipe.measure,
        "model": recipe.model,
        "dtype": recipe.dtype,
        "threads": recipe.threads,
        "kept": recipe.kept,
        "baseline": recipe.baseline,
        "statistic": recipe.statistic,
        "rows": rows,
        "targets": [_verdict(target, recipe, found) for target in recipe.target],
        "complete": all(samples.get(cell, {}).get("status") == "done" for cell in recipe.cells()),
    }


def _row(system: str, length: int, samples: Samples) -> dict[str, Any]:
    mine = [sample for (name, tokens, _), sample in sorted(samples.items()) if (name, tokens) == (system, length)]
    done = [sample for sample in mine if sample["status"] == "done"]
    problems = sorted({sample["reason"] for sample in mine if sample["status"] != "done"})
    metrics = {}
    for name in METRICS:
        values = [sample[name] for sample in done if sample.get(name) is not None]
        if values:
            metrics[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {"system": system, "length": length, "n": len(done), "metrics": metrics, "problems": problems}


def _ratios(row: dict[str, Any], base: dict[str, Any]) -> dict[str, dict[str, float]]:
    ratios = {}
    for name in RATIO_METRICS:
        mine, theirs = row["metrics"].get(name), base["metrics"].get(name)
        if mine and theirs and theirs["median"] > 0 and theirs["min"] > 0:
            ratios[name] = {key: mine[key] / theirs[key] for key in ("median", "min")}
    return ratios


def _verdict(target: Target, recipe: Recipe, found: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """The target with `measured` and `met`; both None where a value it needs was not measured."""
    if target.reference_length is None:
        reference_key = (recipe.baseline, target.length)
    else:
        reference_key = (target.system, target.reference_length)
    value = _value(found.get((target.system, target.length)), target.metric, recipe.statistic)
    reference = _value(found.get(reference_key), target.metric, recipe.statistic)
    measured: float | None = None
    met: bool | None = None
    if target.value_at_most is not None and value is not None:
        measured, met = value, value <= target.value_at_most
    elif target.ratio_at_most is not None and value is not None and reference:
        measured = value / reference
        met = measured <= target.ratio_at_most
    elif target.speedup_at_least is not None and value and reference is not None:
        measured = reference / value
        met = measured >= target.speedup_at_least
    return {"target": describe(target, recipe), "measured": measured, "met": met}


def _value(row: dict[str, Any] | None, metric: str, statistic: str) -> float | None:
    return row["metrics"].get(metric, {}).get(statistic) if row else None


def describe(target: Target, recipe: Recipe) -> str:
    """The target in words."""
    where = recipe.baseline if target.reference_length is None else f"itself at {target.reference_length:,}"
    what = f"{target.metric} of {target.system} at {target.length:,}"
    if target.value_at_most is not None:
        return f"{what}: at most {target.value_at_most:g}"
    if target.ratio_at_most is not None:
        return f"{what}: at most {target.ratio_at_most:g}x that of {where}"
    return f"{what}: at least {target.speedup_at_least:g}x as fast as {where}"


def render(result: dict[str, Any]) -> str:
    """The result of `summarise` as Markdown: one table of measurements, one of targets."""
    rows = result["rows"]
    columns = [name for name in METRICS if any(name in row["metrics"] for row in rows)]
    header = ["tokens", "system", "n"]
    for name in columns:
        header += [TITLES[name]] + (["ratio (median / min)"] if name in RATIO_METRICS else [])
    lines = [
        f"**{result['name']}**: {result['model']}, {result['dtype']}, {result['threads']} threads, "
        f"kept {result['kept']}; {result['statistic']} of n fresh processes; ratio to `{result['baseline']}`",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    for row in rows:
        cells = [f"{row['length']:,}", row["system"], str(row["n"])]
        for name in columns:
            cells.append(_number(row["metrics"].get(name, {}).get(result["statistic"]), name))
            if name in RATIO_METRICS:
                ratio = row["ratios"].get(name)
                cells.append("-" if ratio is None else f"{ratio['median']:.2f} / {ratio['min']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    problems = [f"- {row['system']} at {row['length']:,}: {text}" for row in rows for text in row["problems"]]
    if problems:
        lines += ["", "Not measured:", *problems]
    if result["targets"]:
        lines += ["", "| target | measured | |", "|---|---|---|"]
        for target in result["targets"]:
            measured = "-" if target["measured"] is None else f"{target['measured']:.3g}"
            verdict = {True: "met", False: "**missed**", None: "not measured"}[target["met"]]
            lines.append(f"| {target['target']} | {measured} | {verdict} |")
    return "\n".join(lines)


def _number(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    value *= SCALES.get(metric, 1.0)
    if metric == "score_share":
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 or metric == "kept_tokens" else f"{value:.3g}"

"""From a run folder to numbers and Markdown: accuracy with its interval beside full cache and truncation."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from longfit.errors import InputError
from longfit.eval.intervals import paired_difference, wilson

BASELINES = ("full", "no_context", "truncate")
MEASURED = ("kept_tokens", "kv_bytes", "tokens_in", "prefill_seconds", "seconds", "cpu_seconds")


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every finished sample of a run, of all its shards, once per (cell, sample).

    A last line without an end is being written, or was cut by a kill, and does not count.
    Raises InputError where a whole line is not JSON.
    """
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for file in sorted(folder.glob("samples*.jsonl")):
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                records.setdefault((record["cell"], record["sample"]), record)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{file.name} line {number} is damaged ({error}); remove the line") from error
    return list(records.values())


def summarise(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per cell and task: rate with its 95 % Wilson interval, difference from full, normalised rate, means.

    ``normalised`` is (rate - no context) / (full - no context), None where full does not beat no context.
    """
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["cell"], record["task"]), {})[record["sample"]] = record
    cells: dict[str, dict[str, Any]] = {}
    for (cell, task), group in groups.items():
        first = next(iter(group.values()))
        entry = cells.setdefault(
            cell,
            {key: first[key] for key in ("method", "options", "keep_ratio", "awareness")} | {"tasks": {}},
        )
        right, n = sum(record["correct"] for record in group.values()), len(group)
        low, high = wilson(round(right), n)
        measured = {key: _mean([record[key] for record in group.values()]) for key in MEASURED}
        full, nothing = groups.get(("full", task), {}), groups.get(("no_context", task), {})
        entry["tasks"][task] = {"n": n, "rate": right / n, "interval": [low, high], **measured}
        entry["tasks"][task]["minus_full"] = _difference(group, full)
        entry["tasks"][task]["normalised"] = _normalised(right / n, full, nothing)
    return cells


def _mean(values: list[Any]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> list[float] | None:
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    return list(paired_difference([ours[s]["correct"] for s in both], [theirs[s]["correct"] for s in both]))


def _normalised(rate: float, full: dict[str, Any], nothing: dict[str, Any]) -> float | None:
    if not full or not nothing:
        return None
    top = _mean([record["correct"] for record in full.values()]) or 0.0
    floor = _mean([record["correct"] for record in nothing.values()]) or 0.0
    return (rate - floor) / (top - floor) if top > floor else None


def report(folder: str | Path) -> str:
    """The run's tables as Markdown; also written to ``report.md`` in the folder.

    Raises InputError where the folder holds no run or no finished sample.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{str(folder)!r} is not a run folder: it has no config.yaml")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    records = read_records(folder)
    if not records:
        raise InputError(f"{str(folder)!r} holds no finished sample yet")
    text = markdown(config, summarise(records))
    write_atomically(folder / "report.md", text)
    return text


def markdown(config: dict[str, Any], cells: dict[str, dict[str, Any]]) -> str:
    """One accuracy table and one table of differences per task, then what each cell kept and took."""
    ratios = sorted({cell["keep_ratio"] for cell in cells.values() if cell["keep_ratio"] < 1}, reverse=True)
    rows: dict[str, dict[float, dict[str, Any]]] = {}
    for name, cell in cells.items():
        if cell["keep_ratio"] < 1:
            rows.setdefault(_row(name, cell), {})[cell["keep_ratio"]] = cell
    counts = [task["n"] for cell in cells.values() for task in cell["tasks"].values()]
    finished = f"n = {min(counts)}" + ("" if min(counts) == max(counts) else f" to {max(counts)}")
    lines = [
        f"# {config['name']}",
        "",
        f"{config['model']}, {config['dtype']}, {config['length']:,} tokens, {finished} of {config['n']} "
        f"samples a cell, seed {config['seed']}, greedy, haystack {config['haystack']['source']}. Percent "
        "right with the 95 % Wilson interval; differences are paired, with Newcombe's interval.",
    ]
    for task in config["tasks"]:
        lines += ["", f"## {task}", "", _ends(cells, task), ""]
        lines += _grid(rows, ratios, lambda cell, task=task: _rate(cell["tasks"].get(task)))
        lines += ["", "Minus full cache, in points:", ""]
        lines += _grid(rows, ratios, lambda cell, task=task: _points(cell["tasks"].get(task)))
    lines += [
        "",
        "## Kept and spent",
        "",
        "Means over all samples: kept tokens per layer, MiB of keys and values,",
    ]
    lines += ["seconds of prefill (to the first token for the baselines) and of CPU in all.", ""]
    lines += ["| cell | tokens in | kept | MiB | prefill s | CPU s |", "|---|--:|--:|--:|--:|--:|"]
    lines += [_spent(name, cell) for name, cell in cells.items()]
    return "\n".join(lines) + "\n"


def _row(name: str, cell: dict[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in cell["options"].items())
    method = cell["method"] + (f"({options})" if options else "")
    return f"| {method} | {'-' if cell['method'] in BASELINES else cell['awareness']} |"


def _grid(rows: dict[str, dict[float, dict[str, Any]]], ratios: list[float], show: Any) -> list[str]:
    head = "".join(f" {100 * ratio:g} % kept |" for ratio in ratios)
    lines = [f"| method | question |{head}", "|---|---|" + "--:|" * len(ratios)]
    for row, by_ratio in rows.items():
        lines.append(row + "".join(f" {show(by_ratio[r]) if r in by_ratio else ''} |" for r in ratios))
    return lines


def _ends(cells: dict[str, dict[str, Any]], task: str) -> str:
    shown = [
        f"{label} {_rate(cells[name]['tasks'].get(task))}"
        for name, label in (("full", "Full cache"), ("no_context", "no context"))
        if name in cells
    ]
    return "; ".join(shown) + "."


def _rate(task: dict[str, Any] | None) -> str:
    if task is None:
        return ""
    low, high = task["interval"]
    return f"{100 * task['rate']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _points(task: dict[str, Any] | None) -> str:
    if task is None or task["minus_full"] is None:
        return ""
    mean, low, high = (f"{100 * value:+.0f}" for value in task["minus_full"])
    return f"{mean} [{low}, {high}]"


def _spent(name: str, cell: dict[str, Any]) -> str:
    tasks = list(cell["tasks"].values())
    means = {key: _mean([task[key] for task in tasks]) for key in MEASURED}
    mib = None if means["kv_bytes"] is None else means["kv_bytes"] / 2**20
    numbers = [means["tokens_in"], means["kept_tokens"], mib, means["prefill_seconds"], means["cpu_seconds"]]
    forms = ("{:,.0f}", "{:,.1f}", "{:.1f}", "{:.1f}", "{:.1f}")
    shown = ("" if n is None else form.format(n) for form, n in zip(forms, numbers, strict=True))
    return f"| {name} | {' | '.join(shown)} |"

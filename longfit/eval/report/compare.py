"""Two runs side by side: what differs in their conditions first, then their shared cells, paired by sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longfit.errors import InputError
from longfit.eval.intervals import paired_difference, stratified_mean
from longfit.eval.report.build import write
from longfit.eval.report.document import Block, Heading, Picture, Report, Table, Text
from longfit.eval.report.figure import Plot, new_figure, style
from longfit.eval.report.load import Run, flatten, load
from longfit.eval.report.series import MIB, Row
from longfit.eval.report.tables import marked, score

ALL = "mean"
Place = tuple[str, int, str]


@dataclass(frozen=True)
class Pairing:
    """A cell of both runs on one task, or on ``mean``, the mean over the tasks that both ran.

    ``difference`` is B minus A with its interval (mean, low, high) over the ``pairs`` samples with the same sha256;
    None where no sample is shared. There is no mean where the tasks' units differ.
    """

    place: Place
    task: str
    a: Row
    b: Row
    pairs: int
    difference: tuple[float, float, float] | None


def compare(folder_a: str | Path, folder_b: str | Path, output: str | Path) -> Report:
    """Write report.md, report.html, summary.csv, summary.json and plots/ of the comparison into ``output``.

    Two runs of one model each are compared even where the models differ.

    Raises:
        InputError: a folder holds no run or is damaged, the runs share no cell, or matplotlib is absent.
    """
    a, b = load(folder_a), load(folder_b)
    pairings = pair(a, b)
    if not pairings:
        raise InputError(f"{str(folder_a)!r} and {str(folder_b)!r} share no cell and task at one length")
    names = [str(run.config.get("name") or run.folder.name) for run in (a, b)]
    title = f"{names[0]} (A) and {names[1]} (B)"
    blocks: list[Block] = [Heading(title, 1), Heading("What differs in the conditions", 2), _differing(a, b)]
    paired = [found for found in pairings if found.difference is not None]
    with style():
        plots = [_plot(paired)] if paired else []
        blocks += [Heading("Shared cells", 2), *_tables(pairings), *(plot.picture for plot in plots)]
        blocks += [Heading("Costs", 2), _costs(pairings)]
        return write(title, blocks, plots, [_flat(found) for found in pairings], Path(output))


def differing(a: Run, b: Run) -> list[tuple[str, str, str]]:
    """The keys of config and environment whose values differ, with both; "(absent)" where a run lacks the key."""
    sides = [
        {f"config {key}": value for key, value in flatten(run.config).items() if key != "name"}
        | {f"env {key}": value for key, value in run.environment.items()}
        for run in (a, b)
    ]
    keys = dict.fromkeys([*sides[0], *sides[1]])
    values = ((key, *(side.get(key, "(absent)") for side in sides)) for key in keys)
    return [(key, one, other) for key, one, other in values if one != other]


def _differing(a: Run, b: Run) -> Block:
    rows = tuple(differing(a, b))
    if not rows:
        return Text("Nothing: config and environment are the same.")
    return Table(("key", "A", "B"), rows, 3)


def pair(a: Run, b: Run) -> list[Pairing]:
    """The cells and tasks of both runs, the mean over shared tasks first in each cell."""
    models = [{row["model"] for row in run.rows} for run in (a, b)]
    named = models[0] != models[1] and all(len(found) == 1 for found in models)

    def place(found: dict[str, Any]) -> Place:
        return ("" if named else found["model"], found["length"], found["cell"])

    rows = [{(place(row), row["task"]): row for row in run.rows} for run in (a, b)]
    scores: list[dict[tuple[Place, str], dict[str, float]]] = [{}, {}]
    for side, run in zip(scores, (a, b), strict=True):
        for record in run.records:
            side.setdefault((place(record), record["task"]), {})[record["sha256"]] = float(record["score"])
    found: list[Pairing] = []
    for cell in dict.fromkeys(where for where, _ in rows[0]):
        tasks = [task for where, task in rows[0] if where == cell and task != ALL and (cell, task) in rows[1]]
        values = {task: _shared(scores[0].get((cell, task), {}), scores[1].get((cell, task), {})) for task in tasks}
        for task in tasks:
            ours, theirs = values[task]
            apart = paired_difference(ours, theirs) if ours else None
            found.append(Pairing(cell, task, rows[0][cell, task], rows[1][cell, task], len(ours), apart))
        one_unit = len({rows[0][cell, task]["higher_is_better"] for task in tasks}) == 1
        if len(tasks) > 1 and one_unit and (cell, ALL) in rows[0] and (cell, ALL) in rows[1]:
            means = rows[0][cell, ALL], rows[1][cell, ALL]
            found.insert(len(found) - len(tasks), _over_tasks(cell, found[-len(tasks) :], means, values))
    return found


def _shared(a: dict[str, float], b: dict[str, float]) -> tuple[list[float], list[float]]:
    both = sorted(a.keys() & b.keys())
    return [b[key] for key in both], [a[key] for key in both]


def _over_tasks(
    cell: Place,
    tasks: Sequence[Pairing],
    means: tuple[Row, Row],
    values: dict[str, tuple[list[float], list[float]]],
) -> Pairing:
    apart = {t: [x - y for x, y in zip(*sides, strict=True)] for t, sides in values.items()}
    difference = stratified_mean(apart) if all(apart.values()) else None
    return Pairing(cell, ALL, *means, sum(found.pairs for found in tasks), difference)


def _name(place: Place) -> tuple[str, ...]:
    return (place[0], f"{place[1]:,}", place[2])


def _tables(pairings: Sequence[Pairing]) -> list[Block]:
    several = any(found.task == ALL for found in pairings)
    blocks: list[Block] = []
    for task in sorted({found.task for found in pairings}, key=lambda task: (task != ALL, task)):
        rows = tuple(
            (*_name(found.place), f"{found.pairs}", score(found.a), score(found.b), _difference(found))
            for found in pairings
            if found.task == task
        )
        caption = "Scores with 95 % intervals over all of a run's samples; B - A over the pairs with the same sha256, "
        caption += "bold where the interval excludes 0; empty where no sample is shared."
        if task == ALL:
            caption += " Scores are each run's own mean over its tasks, B - A the mean over the shared tasks."
        blocks += [Heading("Mean over tasks" if task == ALL else task, 3)] if several else []
        blocks.append(Table(("model", "length", "cell", "pairs", "A", "B", "B - A"), rows, 3, caption))
    return blocks


def _difference(found: Pairing) -> str:
    return "" if found.difference is None else marked(*found.difference, found.a["higher_is_better"])


def _costs(pairings: Sequence[Pairing]) -> Table:
    cells = {found.place: found for found in reversed(pairings)}
    rows = []
    for place, found in reversed(cells.items()):
        numbers: list[str] = []
        for key, scale, form in (
            ("kept_tokens", 1, "{:,.0f}"),
            ("kv_bytes", MIB, "{:,.2f}"),
            ("peak_bytes", MIB, "{:,.1f}"),
            ("prefill_seconds", 1, "{:.2f}"),
            ("decode_seconds_per_token", 1, "{:.4f}"),
        ):
            numbers += ["" if row[key] is None else form.format(row[key] / scale) for row in (found.a, found.b)]
        rows.append((*_name(place), *numbers))
    names = ("kept", "KV MiB", "peak MiB", "prefill s", "decode s/token")
    columns = ("model", "length", "cell", *(f"{name} {side}" for name in names for side in "AB"))
    return Table(columns, tuple(rows), 3, "Means over samples; seconds compare only where the machines are the same.")


def _plot(paired: Sequence[Pairing]) -> Plot:
    """The differences of the means over tasks, or of the tasks where there is one, as intervals beside 0."""
    chosen = [found for found in paired if found.task == ALL] or list(paired)
    unit = chosen[0].a["higher_is_better"]
    chosen = [found for found in chosen if found.a["higher_is_better"] == unit]
    scale = 100 if unit else 1
    figure = new_figure(6.5, 1.0 + 0.2 * len(chosen))
    panel = figure.subplots()
    panel.axvline(0, color="#555555", linewidth=0.8)
    labels = []
    for place, found in enumerate(chosen):
        mean, low, high = (scale * value for value in found.difference or (0.0, 0.0, 0.0))
        colour = "#0072B2" if low > 0 else "#D55E00" if high < 0 else "#777777"
        reach = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        panel.errorbar(mean, place, xerr=reach, marker="o", markersize=4, color=colour)
        several = len({other.place[:2] for other in chosen}) > 1
        labels.append(found.place[2] + (f", {found.place[0]} {found.place[1]:,}" if several else ""))
    panel.set_yticks(range(len(chosen)), labels)
    panel.set_ylim(len(chosen) - 0.5, -0.5)
    panel.set_xlabel("B - A, points" if unit else "B - A, nats a token (lower is better)")
    pairs = sorted({found.pairs for found in chosen})
    n = f"n = {pairs[0]}" + (f" to {pairs[-1]}" if len(pairs) > 1 else "")
    caption = f"Paired differences with 95 % intervals, {n} pairs a cell; coloured where the interval excludes 0."
    return Plot(Picture("differences", "B minus A", caption), figure)


def _flat(found: Pairing) -> dict[str, Any]:
    mean, low, high = found.difference or (None, None, None)
    model, length, cell = found.place
    flat: dict[str, Any] = {"model": model or f"{found.a['model']} / {found.b['model']}", "length": length}
    flat |= {"cell": cell, "task": found.task, "pairs": found.pairs}
    flat |= {"difference": mean, "difference_low": low, "difference_high": high}
    keys = ("score", "low", "high", "n", "kept_tokens", "kv_bytes", "peak_bytes", "prefill_seconds")
    return flat | {f"{key}_{side}": row[key] for key in keys for side, row in (("a", found.a), ("b", found.b))}

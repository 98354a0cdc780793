"""Summary rows, sorted into what tables and plots need: conditions, budgets, and one series a method."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from longfit.eval.cells import BASELINES

Row = dict[str, Any]
MIB = 2**20
ENDS = ("full", "no_context")


@dataclass(frozen=True)
class Series:
    """One method with its options, over all budgets. ``variant`` is what tells it from the method's plain form."""

    method: str
    variant: str
    awareness: str

    @property
    def label(self) -> str:
        return self.method + self.variant

    @property
    def title(self) -> str:
        return f"{self.label}, aware" if self.awareness == "aware" else self.label

    @property
    def question(self) -> str:
        return "-" if self.method in BASELINES else self.awareness


def series_of(row: Row) -> Series:
    """The row's series."""
    options = ", ".join(f"{key}={_short(value)}" for key, value in sorted((row["options"] or {}).items()))
    variant = (f"({options})" if options else "") + (
        f", chunk {row['chunk_tokens']}" if row.get("chunk_tokens") else ""
    )
    beside = row.get("attention")
    if beside and not beside.startswith(row["method"]):
        variant += f" + {beside}"
    return Series(row["method"], variant, row["awareness"])


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Condition:
    """All rows of one model at one length. ``suffix`` tells its plots' files from other conditions'."""

    model: str
    length: int
    suffix: str
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        return f"{self.model}, {self.length:,} tokens"

    @property
    def tasks(self) -> list[str]:
        return [task for task in dict.fromkeys(row["task"] for row in self.rows) if task != "mean"]

    def means(self) -> list[Row]:
        """A row a cell: the mean over tasks. None where some tasks' scores rise and others' fall with quality."""
        if len({row["higher_is_better"] for row in self.rows if row["task"] != "mean"}) > 1:
            return []
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row["cell"], []).append(row)
        means = []
        for rows in found.values():
            mean = [row for row in rows if row["task"] == "mean"]
            means += mean or (rows if len(rows) == 1 else [])
        return means

    def of(self, task: str) -> list[Row]:
        return self.means() if task == "mean" else [row for row in self.rows if row["task"] == task]


def conditions_of(rows: Iterable[Row]) -> list[Condition]:
    """The rows by model and length, in the order of the run."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["length"]), []).append(row)
    alone = len(groups) == 1
    return [
        Condition(model, length, "" if alone else "-" + re.sub(r"[^\w.]+", "-", f"{model}-{length}"), tuple(found))
        for (model, length), found in groups.items()
    ]


def end(rows: Iterable[Row], method: str) -> Row | None:
    """The row of ``full`` or ``no_context``, which have no budget."""
    return next((row for row in rows if row["method"] == method), None)


def budgets_of(rows: Iterable[Row]) -> list[str]:
    """The budgets of all cells but the two ends, the largest first."""
    sizes: dict[str, float] = {}
    for row in rows:
        if row["method"] not in ENDS:
            size = row["keep_ratio"] if row["keep_ratio"] is not None else (row["kv_bytes"] or 0)
            if row["budget"].endswith(" read"):
                size = float(row["budget"].split()[0])
            sizes[row["budget"]] = max(size, sizes.get(row["budget"], 0))
    return sorted(sizes, key=lambda budget: (-sizes[budget], budget))


def by_series(rows: Iterable[Row]) -> dict[Series, list[Row]]:
    """Rows by series: the ends and truncation first, then by name, agnostic before aware."""
    groups: dict[Series, list[Row]] = {}
    for row in rows:
        groups.setdefault(series_of(row), []).append(row)

    def place(series: Series) -> tuple[int, str, str, str]:
        first = BASELINES.index(series.method) if series.method in BASELINES else len(BASELINES)
        return first, series.method, series.variant, series.awareness

    return {series: groups[series] for series in sorted(groups, key=place)}


def at_budget(rows: Iterable[Row], budget: str) -> list[Row]:
    """The rows of ``budget``, and those of the two ends, in the order of `by_series`."""
    chosen = [row for row in rows if row["budget"] == budget or row["method"] in ENDS]
    return [row for group in by_series(chosen).values() for row in group]


def methods_of(rows: Iterable[Row]) -> list[str]:
    """The compressors' names, sorted: the order of their colours."""
    return sorted({row["method"] for row in rows} - set(BASELINES))


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """The indices of the (cost, quality) points that no other point beats or equals in both, the cheapest first."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def shown_value(row: Row, value: float) -> float:
    """A score in per cent; where lower is better (nats a token) as it is."""
    return 100 * value if row["higher_is_better"] else value


def counts(rows: Iterable[Row]) -> str:
    """The number of samples behind the rows, for a caption."""
    found = sorted({row["n"] for row in rows})
    if not found:
        return "n = 0"
    return f"n = {found[0]}" + ("" if len(found) == 1 else f" to {found[-1]}")

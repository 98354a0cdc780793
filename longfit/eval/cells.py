"""One way to answer: a method or a baseline, how much it keeps, and whether the question is seen."""

from dataclasses import dataclass, field
from typing import Any

from longfit.budget import MemoryBudget
from longfit.errors import InputError

BASELINES = ("full", "no_context", "truncate")


@dataclass(frozen=True)
class Cell:
    """A column of a sweep.

    Attributes:
        method: a compressor, or a baseline: `full` (the plain model), `no_context` (the prompt with nothing in the
            place of its content) or `truncate` (both ends of the context, as many tokens as a method would keep).
        budget: as `longfit.wrap` takes it; "100%" for full and no_context.
        awareness: "agnostic" compresses before the question is known, "aware" with the question in sight.
        options: of the method.
        chunk_tokens: of the prefill; None lets longfit choose.
    """

    method: str
    budget: str = "100%"
    awareness: str = "agnostic"
    options: dict[str, Any] = field(default_factory=dict)
    chunk_tokens: int | None = None

    @property
    def cell_id(self) -> str:
        if self.method in ("full", "no_context"):
            return self.method
        options = ",".join(f"{key}={self.options[key]}" for key in sorted(self.options))
        aware = "" if self.method in BASELINES else f"-{self.awareness}"
        chunk = f"-chunk{self.chunk_tokens}" if self.chunk_tokens else ""
        return f"{self.method}{f'({options})' if options else ''}-{self.budget.replace(' ', '')}{aware}{chunk}"

    @property
    def baseline(self) -> bool:
        return self.method in BASELINES

    @property
    def keep_ratio(self) -> float | None:
        """The fraction kept, where the budget is one."""
        return float(self.budget[:-1]) / 100 if self.budget.endswith("%") else None


def expand(groups: list[dict[str, Any]]) -> list[Cell]:
    """All cells of a recipe's groups, baselines first, each once.

    Raises:
        InputError: a group that cannot be run.
    """
    found: dict[str, Cell] = {}
    for group in groups:
        if unknown := sorted(set(group) - {"methods", "keep_ratios", "budgets", "awareness", "chunk_tokens"}):
            raise InputError(f"unknown key {', '.join(unknown)} in a group of cells")
        if "methods" not in group:
            raise InputError("a group of cells lacks methods")
        for method, options in map(_method, group["methods"]):
            plain = method in ("full", "no_context")
            aware = ["agnostic"] if method in BASELINES else group.get("awareness") or _awareness(method, options)
            for budget in ["100%"] if plain else _budgets(group, method):
                for mode in aware:
                    if mode not in ("agnostic", "aware"):
                        raise InputError(f"awareness {mode!r} of {method}: use agnostic or aware")
                    chunk = None if method in BASELINES else group.get("chunk_tokens")
                    cell = Cell(method, budget, mode, options, chunk)
                    found.setdefault(cell.cell_id, cell)
    return sorted(found.values(), key=lambda cell: not cell.baseline)


def _budgets(group: dict[str, Any], method: str) -> list[str]:
    ratios = group.get("keep_ratios", [])
    for ratio in ratios:
        if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise InputError(f"keep_ratio {ratio} of {method} is not in (0, 1]")
    budgets = [f"{100 * ratio:g}%" for ratio in ratios] + [str(given) for given in group.get("budgets", [])]
    if not budgets:
        raise InputError(f"{method} has neither keep_ratios nor budgets; give at least one")
    for budget in budgets:
        MemoryBudget.parse(budget)
    return budgets


def _method(entry: str | dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if len(entry) != 1:
        raise InputError(f"a method with options is a mapping of one name, not {entry}")
    return next(iter(entry.items()))


def _awareness(method: str, options: dict[str, Any]) -> list[str]:
    """Both ways for a method that looks at the question where it is known, else without it."""
    from longfit.compressors import get

    return ["agnostic", "aware"] if get(method, **options).query_aware else ["agnostic"]

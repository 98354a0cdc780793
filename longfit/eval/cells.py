"""One way to answer: a method, an attention or a baseline, how much it keeps, and whether the question is seen."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from longfit import attention as attentions
from longfit.attention import AttentionPatch
from longfit.budget import MemoryBudget
from longfit.compressors import available_prompt, available_soft
from longfit.errors import InputError

OWN = "own"
BASELINES = ("full", "no_context", "truncate")
GROUP_KEYS = {"methods", "keep_ratios", "budgets", "awareness", "chunk_tokens", "attention", "read_tokens"}


@dataclass(frozen=True)
class Cell:
    """A column of a sweep.

    Attributes:
        method: a compressor, an attention alone, or a baseline: `full` (the plain model), `no_context` (the prompt with
            nothing in the place of its content) or `truncate` (both ends of the context, as many tokens as a method
            would keep).
        budget: as `longfit.wrap` takes it; "own" for a learned or prompt compressor at its own ratio; "100%" for full
            and no_context; for an attention alone "64 read", the stored entries that a decoded token attends to, or
            "100%" where it has no such size.
        awareness: "agnostic" compresses before the question is known, "aware" with the question in sight.
        options: of the method; those of an attention alone without its size.
        attention: options of the attention that stands in for full attention, with its `name`; None for full attention.
        chunk_tokens: of the prefill; None lets longfit choose.
    """

    method: str
    budget: str = "100%"
    awareness: str = "agnostic"
    options: dict[str, Any] = field(default_factory=dict)
    chunk_tokens: int | None = None
    attention: dict[str, Any] | None = None

    @property
    def cell_id(self) -> str:
        if self.method in ("full", "no_context"):
            return self.method
        aware = "" if self.method in BASELINES else f"-{self.awareness}"
        chunk = f"-chunk{self.chunk_tokens}" if self.chunk_tokens else ""
        beside = f"+{self.attention_label}" if self.attention and not self.attends_alone else ""
        return f"{called(self.method, self.options)}-{self.budget.replace(' ', '')}{aware}{chunk}{beside}"

    @property
    def attends_alone(self) -> bool:
        """No compressor: everything is kept that the attention can still look at."""
        return self.attention is not None and self.attention["name"] == self.method

    @property
    def attention_label(self) -> str | None:
        """The attention with its options."""
        if self.attention is None:
            return None
        return called(self.attention["name"], {k: v for k, v in self.attention.items() if k != "name"})

    @property
    def patch(self) -> AttentionPatch | None:
        """The attention, made new."""
        return None if self.attention is None else attentions.get(**self.attention)

    @property
    def prefills_alone(self) -> bool:
        """The prefill is the cell's own: the model does not read the context as it would alone."""
        return self.learned or self.shortens or (self.patch is not None and "prefill" in self.patch.phases)

    @property
    def learned(self) -> bool:
        """The context is compressed by a learned compressor."""
        return self.method in available_soft()

    @property
    def shortens(self) -> bool:
        """A prompt compressor leaves out tokens before the model reads any."""
        return self.method in available_prompt() and not self.baseline

    @property
    def baseline(self) -> bool:
        return self.method in BASELINES

    @property
    def keep_ratio(self) -> float | None:
        """The fraction kept, where the budget is one."""
        return float(self.budget[:-1]) / 100 if self.budget.endswith("%") else None


def called(name: str, options: dict[str, Any]) -> str:
    """A name with its options, as cells are called."""
    shown = ",".join(f"{key}={options[key]}" for key in sorted(options))
    return f"{name}({shown})" if shown else name


def expand(groups: list[dict[str, Any]]) -> list[Cell]:
    """All cells of a recipe's groups, baselines first, each once.

    Raises:
        InputError: a group that cannot be run.
    """
    found: dict[str, Cell] = {}
    for group in groups:
        if unknown := sorted(set(group) - GROUP_KEYS):
            raise InputError(f"unknown key {', '.join(unknown)} in a group of cells")
        if not group.keys() & {"methods", "attention"}:
            raise InputError("a group of cells lacks methods, or attention")
        attention = list(_attentions(group))
        if "methods" not in group:
            for made in _attending(attention, group):
                found.setdefault(made.cell_id, made)
            continue
        for method, options in map(_method, group["methods"]):
            plain = method in ("full", "no_context")
            aware = ["agnostic"] if method in BASELINES else group.get("awareness") or _awareness(method, options)
            for budget in ["100%"] if plain else _budgets(group, method):
                for mode in aware:
                    if mode not in ("agnostic", "aware"):
                        raise InputError(f"awareness {mode!r} of {method}: use agnostic or aware")
                    if mode == "agnostic" and method not in BASELINES and _needs_question(method):
                        raise InputError(f"{method} chooses with the question in sight only: use awareness: [aware]")
                    chunk = None if method in BASELINES else group.get("chunk_tokens")
                    for patch in [None] if method in BASELINES or not attention else attention:
                        cell = Cell(method, budget, mode, options, chunk, patch)
                        found.setdefault(cell.cell_id, cell)
    return sorted(found.values(), key=lambda cell: not cell.baseline)


def _attentions(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every attention of a group with its options, at every size that the group asks for."""
    sizes = group.get("read_tokens", [None])
    for name, options in map(_method, group.get("attention", [])):
        for size in sizes:
            if size is not None and (not isinstance(size, int) or size < 1):
                raise InputError(f"read_tokens {size} of {name} is not a number of tokens")
            kind = type(attentions.get(name))
            own = options if size is None else options | kind.reading(size)
            attentions.get(name, **own)
            yield {"name": name} | own


def _attending(attention: list[dict[str, Any]], group: dict[str, Any]) -> Iterator[Cell]:
    """Cells of attentions alone."""
    if wrong := sorted(group.keys() & {"keep_ratios", "budgets"}):
        raise InputError(
            f"{wrong[0]} belongs to compressors; an attention alone has read_tokens, or name `methods` too"
        )
    for given in attention:
        options = {key: value for key, value in given.items() if key != "name"}
        budget = "100%"
        for size in group.get("read_tokens", []):
            sized = type(attentions.get(given["name"])).reading(size)
            if sized.items() <= options.items():
                budget, options = f"{size} read", {k: v for k, v in options.items() if k not in sized}
        for mode in group.get("awareness", ["agnostic"]):
            yield Cell(given["name"], budget, mode, options, group.get("chunk_tokens"), given)


def _budgets(group: dict[str, Any], method: str) -> list[str]:
    ratios = group.get("keep_ratios", [])
    for ratio in ratios:
        if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise InputError(f"keep_ratio {ratio} of {method} is not in (0, 1]")
    budgets = [f"{100 * ratio:g}%" for ratio in ratios] + [str(given) for given in group.get("budgets", [])]
    if not budgets and method in {**available_soft(), **available_prompt()} and method not in BASELINES:
        return [OWN]
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


def _needs_question(method: str) -> bool:
    """A prompt compressor that chooses with the question does not choose without it."""
    return method in available_prompt() and available_prompt()[method].query_aware


def _awareness(method: str, options: dict[str, Any]) -> list[str]:
    """Both ways for a method that looks at the question where it is known, else without it; prompt compressors that do
    choose with it only."""
    from longfit.compressors import get

    if method in available_prompt():
        return ["aware" if _needs_question(method) else "agnostic"]
    return ["agnostic", "aware"] if get(method, **options).query_aware else ["agnostic"]

"""plan(): what an input costs under a memory budget, before any work. Arithmetic only, no tensors."""

from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Any

from longfit.costs import Costs, ScoreWorkspace
from longfit.errors import BudgetError
from longfit.shapes import ModelShape
from longfit.units import (
    ACCEPTED_FORMS,
    MemoryBudget,
    exact_bytes,
    format_bytes,
    kept_for_ratio,
    parse_bytes,
    parse_tokens,
)
from longfit.working_set import entry_bytes, working_set_terms

__all__ = [
    "ACCEPTED_FORMS",
    "MIN_CHUNK_TOKENS",
    "MemoryBudget",
    "ModelShape",
    "Plan",
    "entry_bytes",
    "exact_bytes",
    "format_bytes",
    "kept_for_ratio",
    "parse_bytes",
    "parse_tokens",
    "plan",
    "working_set_terms",
]

MIN_CHUNK_TOKENS = 64
MAX_CHUNK_TOKENS = 2048
# A chunk larger than the floor is only taken where what is stored still gets half of a budget in bytes.
STORED_PART = 2
RATIO_STEP = Decimal("0.01")  # per cent; the grain of "the smallest share that would do"


@dataclass(frozen=True)
class Plan:
    """What a budget means for one model and one input. All sizes in bytes, for all rows together.

    Attributes:
        budget: the budget as it was given.
        tokens: input tokens per row.
        new_tokens: tokens to be generated.
        batch_size: rows.
        weights_bytes: the model's weights.
        kv_full_bytes: keys and values that a plain model would hold at the end.
        kv_kept_bytes: what is held instead at the end: keys, values, positions and states of the
            compressible layers, and the sliding layers.
        kept_tokens: entries kept per compressible layer and row.
        keep_ratio: kept_tokens as a fraction of all tokens.
        chunk_tokens: tokens of one chunk of prefill.
        working_set: named bytes alive while a chunk passes one layer.
        prefill_peak_bytes: kv_kept_bytes and the working set.
        total_peak_bytes: the same with the weights.
        limit_bytes: the most that prefill_peak_bytes may be; None for budgets in tokens or per cent.
    """

    budget: MemoryBudget
    tokens: int
    new_tokens: int
    batch_size: int
    weights_bytes: int
    kv_full_bytes: int
    kv_kept_bytes: int
    kept_tokens: int
    keep_ratio: float
    chunk_tokens: int
    working_set: dict[str, int]
    prefill_peak_bytes: int
    total_peak_bytes: int
    limit_bytes: int | None

    @property
    def working_set_bytes(self) -> int:
        """The sum of the working set's terms."""
        return sum(self.working_set.values())

    @property
    def fits(self) -> bool:
        """The peak is inside the budget (a plan that is not is never returned)."""
        return self.limit_bytes is None or self.prefill_peak_bytes <= self.limit_bytes

    @property
    def dropped_tokens(self) -> int:
        """Tokens per row whose entries a compressible layer does not hold at the end."""
        return self.tokens + self.new_tokens - self.kept_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {
            **asdict(self),
            "budget": str(self.budget),
            "working_set_bytes": self.working_set_bytes,
            "dropped_tokens": self.dropped_tokens,
            "fits": self.fits,
        }

    def __str__(self) -> str:
        limit = "" if self.limit_bytes is None else f" of {format_bytes(self.limit_bytes)}"
        rows = [
            ("input", f"{self.tokens:,} tokens" + (f" x {self.batch_size} rows" * (self.batch_size > 1))),
            ("budget", str(self.budget)),
            ("weights", format_bytes(self.weights_bytes)),
            ("KV of the plain model", format_bytes(self.kv_full_bytes)),
            ("KV kept", f"{format_bytes(self.kv_kept_bytes)}, with positions and states"),
            ("kept per layer", f"{self.kept_tokens:,} tokens ({100 * self.keep_ratio:.4g} %)"),
            ("chunk", f"{self.chunk_tokens:,} tokens"),
            ("working set", format_bytes(self.working_set_bytes)),
            *((f"  {name}", format_bytes(size)) for name, size in self.working_set.items() if size),
            ("prefill peak", format_bytes(self.prefill_peak_bytes) + limit),
            ("with weights", format_bytes(self.total_peak_bytes)),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def plan(
    shape: ModelShape,
    *,
    tokens: int | str,
    budget: MemoryBudget | str,
    batch_size: int = 1,
    chunk_tokens: int | None = None,
    max_chunk_tokens: int = MAX_CHUNK_TOKENS,
    entry_state_bytes: int = 0,
    layer_state_bytes: int = 0,
    score_workspace: ScoreWorkspace = 0,
    min_tokens: int = 1,
    new_tokens: int = 0,
    packed: bool = False,
) -> Plan:
    """How an input is held within a budget: entries kept per layer, chunk size, peak.

    A budget in bytes covers everything stored for all layers and rows plus the working set of one chunk;
    a total covers the weights too. What the sliding layers hold comes off first. The chunk is the largest
    power of two from 64 to ``max_chunk_tokens`` that keeps everything, or leaves at least half of the
    budget to what is stored; the entries kept are then the most that fit, to the entry.

    Args:
        shape: the model.
        tokens: input tokens per row, also as "120k".
        budget: parsed, or a text for :meth:`MemoryBudget.parse` ("total=2GiB" for a total).
        batch_size: rows.
        chunk_tokens: a fixed chunk; None lets the plan choose.
        max_chunk_tokens: the largest chunk to choose, and the chunk of budgets in tokens or per cent.
        entry_state_bytes: bytes a method keeps per key/value head and entry (scores, say).
        layer_state_bytes: bytes a method keeps per layer and row (a window of queries, say).
        score_workspace: bytes that scoring one layer allocates at once, or a function of (chunk tokens,
            kept tokens) that must not fall when either grows.
        min_tokens: the fewest entries the method can work with (sinks and window).
        new_tokens: tokens to be generated, which count as input that may be kept.
        packed: positions are packed, which takes room to rotate kept keys.

    Raises:
        BudgetError: the budget cannot be met; it names the smallest budget in the same unit that would do.
        InputError: ``tokens`` is not a positive whole number.
    """
    tokens = parse_tokens(tokens)
    budget = MemoryBudget.parse(budget)
    if min(batch_size, max_chunk_tokens, 1 if chunk_tokens is None else chunk_tokens) < 1:
        raise BudgetError("batch_size, chunk_tokens and max_chunk_tokens are at least 1")
    seen = tokens + new_tokens
    states = entry_state_bytes, layer_state_bytes, score_workspace
    costs = Costs(shape, seen, tokens, batch_size, *states, packed)
    chunks = _chunk_choices(tokens, chunk_tokens, max_chunk_tokens)
    # Nothing is dropped from an input that is shorter than sinks and window.
    required = min(min_tokens, seen) if shape.full_layers else seen
    limit: int | None = None
    if budget.budget_bytes is not None or budget.total_bytes is not None:
        limit, kept, chunk = _fit_bytes(costs, budget, chunks, required)
    else:
        kept, chunk = _fit_entries(budget, tokens, seen, required), chunks[-1]
        if not shape.full_layers:
            kept = seen
    peak = costs.peak(kept, chunk)
    return Plan(
        budget=budget,
        tokens=tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        weights_bytes=shape.weights_bytes,
        kv_full_bytes=costs.full_bytes,
        kv_kept_bytes=costs.stored(kept),
        kept_tokens=kept,
        keep_ratio=kept / seen,
        chunk_tokens=chunk,
        working_set=costs.terms(kept, chunk),
        prefill_peak_bytes=peak,
        total_peak_bytes=peak + shape.weights_bytes,
        limit_bytes=limit,
    )


def _chunk_choices(tokens: int, chunk_tokens: int | None, max_chunk_tokens: int) -> list[int]:
    """Chunks to consider, ascending: powers of two up to the first that holds the whole input."""
    if chunk_tokens is not None:
        return [chunk_tokens]
    choices = [min(MIN_CHUNK_TOKENS, max_chunk_tokens)]
    while choices[-1] * 2 <= max_chunk_tokens and choices[-1] < tokens:
        choices.append(choices[-1] * 2)
    return choices


def _fit_bytes(costs: Costs, budget: MemoryBudget, chunks: list[int], required: int) -> tuple[int, int, int]:
    """(limit, kept entries, chunk) for a budget in bytes, or the refusal with the smallest that would do."""
    weights = costs.shape.weights_bytes if budget.total_bytes is not None else 0
    given = budget.total_bytes if budget.budget_bytes is None else budget.budget_bytes
    assert given is not None
    limit = given - weights
    best: tuple[int, int] | None = None
    for chunk in chunks:
        kept = costs.most_kept(limit, chunk)
        if kept < required:
            break
        if best is None or kept == costs.seen_tokens or STORED_PART * costs.stored(kept) >= limit:
            best = kept, chunk
    if best is not None:
        return limit, *best
    smallest, needed = min((costs.peak(kept, chunks[0]), kept) for kept in (required, costs.seen_tokens))
    working = sum(costs.terms(needed, chunks[0]).values())
    if weights and limit <= 0:
        problem = f"the weights alone take {format_bytes(weights)}"
    elif working > limit:
        problem = f"one chunk of {chunks[0]} tokens alone takes {format_bytes(working)} to compute"
    elif costs.sliding_bytes + working > limit:
        problem = f"the sliding-window layers alone take {format_bytes(costs.sliding_bytes)}"
    else:
        problem = f"fewer than the {required:,} tokens a layer has to keep would fit"
    field = "budget_bytes" if budget.total_bytes is None else "total_bytes"
    smallest += weights
    raise _refusal(budget, problem, MemoryBudget(**{field: smallest}), format_bytes(smallest))


def _fit_entries(budget: MemoryBudget, tokens: int, seen: int, required: int) -> int:
    """Kept entries for a budget in tokens or per cent, or the refusal with the smallest that would do."""
    if budget.kept_tokens is not None:
        if budget.kept_tokens < required:
            problem = f"a layer has to keep {required:,} tokens (sinks and window)"
            raise _refusal(budget, problem, MemoryBudget(kept_tokens=required))
        return min(budget.kept_tokens, seen)
    assert budget.keep_ratio is not None
    if budget.keep_ratio == 1:
        return seen
    kept = kept_for_ratio(tokens, budget.keep_ratio) if budget.keep_ratio else 0
    if kept < required:
        # Any share above 0 keeps one entry.
        exact = Decimal(100 * required) / tokens if required > 1 else RATIO_STEP
        steps = (exact / RATIO_STEP).to_integral_value(ROUND_CEILING)
        percent = min(Decimal(100), steps * RATIO_STEP)
        problem = f"that keeps {kept:,} of {tokens:,} tokens, a layer has to keep {required:,} (sinks and window)"
        raise _refusal(budget, problem, MemoryBudget(keep_ratio=float(percent / 100)))
    return kept


def _refusal(budget: MemoryBudget, problem: str, would_do: MemoryBudget, readable: str = "") -> BudgetError:
    shown = f" (about {readable})" if readable else ""
    return BudgetError(
        f"the memory budget {budget} cannot be met: {problem}; the smallest that would do is {would_do}{shown}"
    )

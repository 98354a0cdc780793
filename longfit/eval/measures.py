"""What an answer kept and spent, and the checks that nothing was kept in silence."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from longfit.cache import FitCache
from longfit.errors import BudgetExceededError, ScoreError
from longfit.eval.cells import OWN, Cell

BINS = 64


@dataclass
class Outcome:
    """What one answer was and took.

    Attributes:
        text: the answer; nll: negative log-likelihood of each target token in nats, for tasks without an answer.
        prefill_seconds: wall time to the first token, compression included; decode_seconds: from there to the end.
        new_tokens: of the answer.
    """

    text: str = ""
    nll: list[float] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    new_tokens: int = 0


@dataclass
class Held:
    """What the cache held when the context had been read.

    Attributes:
        tokens_in: tokens read; kept_tokens: entries kept per layer, averaged over heads.
        kv_bytes: allocated; full_kv_bytes: what a plain cache of tokens_in holds.
        limit_tokens: entries per layer that the budget allows, where it is absolute.
    """

    tokens_in: int
    kept_tokens: float
    kv_bytes: int
    full_kv_bytes: int
    limit_tokens: int | None = None

    def record(self) -> dict[str, Any]:
        values = asdict(self)
        del values["limit_tokens"]
        return values | {"kept_tokens": round(self.kept_tokens, 2)}


def check_kept(cell: Cell, held: Held, new_tokens: int) -> None:
    """A cell that dropped nothing, or too little, would show full-cache quality under a method's name.

    Raises:
        ScoreError: nothing was dropped although the input is over the budget.
        BudgetExceededError: more was kept than the budget allows.
    """
    if cell.budget == OWN and held.kept_tokens >= held.tokens_in:
        raise ScoreError(f"{cell.cell_id} kept all of {held.tokens_in} tokens: nothing was compressed")
    ratio, limit = cell.keep_ratio, held.limit_tokens
    allowed = ratio * held.tokens_in if ratio is not None else limit
    if allowed is None:
        return
    if allowed < held.tokens_in <= held.kept_tokens:
        kept = f"{held.kept_tokens:g} of {held.tokens_in} tokens"
        raise ScoreError(f"{cell.cell_id} kept {kept}: nothing was compressed at {cell.budget}")
    # What is generated comes on top of a share of the input, and of what a prompt was shortened to.
    if held.kept_tokens > allowed + new_tokens * (ratio is not None or cell.shortens):
        raise BudgetExceededError(
            f"{cell.cell_id} kept {held.kept_tokens:g} of {held.tokens_in} tokens, above {cell.budget}"
        )


def kept_map(cache: FitCache, tokens: int, bins: int = BINS) -> list[list[int]]:
    """Per cent of the first row's entries kept in each of `bins` stretches of the input: [layers][bins]."""
    bins = min(bins, tokens)
    width = torch.bincount(torch.arange(tokens) * bins // tokens, minlength=bins)
    rows = []
    for layer in cache.bounded:
        counts, heads = torch.zeros(bins), 0
        for part in layer.parts:
            if part.store is None or part.rows.start != 0:
                continue
            places = cache.sources(0, part.store.positions[0].cpu().long())
            heads += places.shape[0]
            inside = places[places < tokens]
            counts += torch.bincount(inside * bins // tokens, minlength=bins)
        rows.append((100 * counts / (width * max(1, heads))).round().int().tolist())
    return rows

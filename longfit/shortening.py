"""What a prompt compressor does in a wrapped model: the prompt becomes shorter before anything reads it."""

import torch
from torch import Tensor

from longfit.cache import Allowance, FitCache, Shortened
from longfit.compressors import PromptCompressor
from longfit.compressors.prompt.base import Kept
from longfit.errors import BudgetError, UnsupportedFeatureError


def target(compressor: PromptCompressor, tokens: int, allowance: Allowance | None, learned: bool) -> int:
    """Tokens that a row of `tokens` tokens becomes, at most.

    Alone, it becomes what the budget allows, or without a budget what the compressor's options say. Before another
    compressor the options say it, for rows that pass the budget; left out, half the row, but never below what the
    budget has room for (where what follows is no learned compressor, which makes less of it yet).
    """
    if allowance is None:
        return compressor.own_target(tokens)
    limit = allowance.tokens(tokens)
    if allowance.last or tokens <= limit:
        return min(tokens, limit)
    own = compressor.own_target(tokens)
    chosen = compressor.keep_ratio is not None or compressor.kept_tokens is not None
    return own if chosen or learned else max(own, limit)


def shorten(
    compressor: PromptCompressor,
    cache: FitCache,
    ids: Tensor,
    padding: list[int] | None,
    answers: bool,
    learned: bool,
    aside: int = 0,
) -> tuple[Tensor, list[int] | None]:
    """Let the compressor leave out tokens of a prompt, and let its empty cache know which.

    Where an answer follows and nobody said what is asked, the last tokens of each row stay.

    Args:
        ids: [B, T], left-padded by `padding` columns.
        answers: an answer follows.
        learned: a learned compressor compresses what is left.
        aside: last tokens of each row that will not be stored, and do not count.

    Returns:
        What is left, [B, T], and its padding.

    Raises:
        BudgetError: a row's tail and frame alone are more than the budget.
        UnsupportedFeatureError: embeddings instead of ids.
    """
    if ids.is_floating_point():
        raise UnsupportedFeatureError(f"{compressor.name} shortens token ids; inputs_embeds have none")
    tail = cache.question_tokens or (compressor.window_tokens if answers else 0)
    before = padding or [0] * ids.shape[0]
    made: dict[tuple[int, ...], Kept] = {}
    rows = [tuple(row[p:].tolist()) for row, p in zip(ids, before, strict=True)]
    for row in rows:
        if row not in made:
            asked = bool(cache.question_tokens)
            made[row] = _kept(compressor, row, min(tail, len(row)), asked, cache.allowance, learned, aside)
    if all(len(made[row].ids) == len(row) for row in rows):
        return ids, padding
    shortened = _joined(ids, before, rows, [made[row] for row in rows])
    cache.shortened = shortened.without_last(aside)
    if cache.ledger.keep_ratio is not None:  # a share of what was given, not of what is left of it
        share_left = min(len(row) / max(1, len(made[row].ids)) for row in rows)
        cache.ledger.keep_ratio = min(1.0, cache.ledger.keep_ratio * share_left)
    return shortened.ids, shortened.own_padding


def _joined(ids: Tensor, padding: list[int], rows: list[tuple[int, ...]], kept: list[Kept]) -> Shortened:
    """The shorter prompt of all rows, left-padded to the longest, for the ids [B, T] as given."""
    longest = max(len(row.ids) for row in kept)
    own_padding = [longest - len(row.ids) for row in kept]
    fill = int(ids[0, 0])
    shorter = [[fill] * p + row.ids for row, p in zip(kept, own_padding, strict=True)]
    return Shortened(
        ids=torch.tensor(shorter, dtype=ids.dtype, device=ids.device),
        own_padding=own_padding,
        places=[torch.tensor(row.places, dtype=torch.long) for row in kept],
        tokens=[len(row) for row in rows],
        padding=list(padding),
        columns=ids.shape[1] - longest,
    )


def _kept(
    compressor: PromptCompressor,
    row: tuple[int, ...],
    tail: int,
    asked: bool,
    allowance: Allowance | None,
    learned: bool,
    aside: int,
) -> Kept:
    n = len(row)
    kept = target(compressor, n - aside, allowance, learned) + aside
    if kept >= n:
        return Kept(list(row), list(range(n)))
    context, rest = list(row[: n - tail]), list(row[n - tail :])
    if kept < tail:
        raise BudgetError(
            f"{compressor.name}: {tail:,} tokens at the end of the prompt stay as they are, and the budget leaves the "
            f'prompt {kept:,}; the smallest that would do is "{tail} tokens", and more for something of the context'
        )
    question = compressor.question_from(rest) if asked else None
    made = compressor.compress(context, kept - tail, question)
    return Kept([*made.ids, *rest], [*made.places, *range(n - tail, n)])

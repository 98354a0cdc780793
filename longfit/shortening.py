"""What a prompt compressor does in a wrapped model: the prompt becomes shorter before anything reads it."""

import torch
from torch import Tensor

from longfit.cache import Allowance, Shortened
from longfit.compressors import PromptCompressor
from longfit.compressors.prompt.base import Kept
from longfit.errors import BudgetError


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
    ids: Tensor,
    padding: list[int],
    tail: int,
    asked: bool,
    allowance: Allowance | None,
    learned: bool,
    aside: int = 0,
) -> Shortened | None:
    """Shorten every row of a prompt; None where nothing is to be left out.

    Args:
        ids: [B, T], left-padded by `padding` columns.
        tail: last tokens of each row that stay as they are: the question, or the last of what was read.
        asked: the tail is the question.
        learned: a learned compressor compresses what is left.
        aside: last tokens of each row that will not be stored, and do not count.

    Raises:
        BudgetError: a row's tail and frame alone are more than the budget.
    """
    made: dict[tuple[int, ...], Kept] = {}
    rows = [tuple(row[p:].tolist()) for row, p in zip(ids, padding, strict=True)]
    for row in rows:
        if row not in made:
            made[row] = _shortened(compressor, row, min(tail, len(row)), asked, allowance, learned, aside)
    if all(len(made[row].ids) == len(row) for row in rows):
        return None
    longest = max(len(made[row].ids) for row in rows)
    own_padding = [longest - len(made[row].ids) for row in rows]
    fill = int(ids[0, 0])
    shorter = [[fill] * p + made[row].ids for row, p in zip(rows, own_padding, strict=True)]
    return Shortened(
        ids=torch.tensor(shorter, dtype=ids.dtype, device=ids.device),
        own_padding=own_padding,
        places=[torch.tensor(made[row].places, dtype=torch.long) for row in rows],
        tokens=[len(row) for row in rows],
        padding=list(padding),
        columns=ids.shape[1] - longest,
    )


def _shortened(
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

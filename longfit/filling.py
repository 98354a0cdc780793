"""What a learned compressor does in a wrapped model: the context becomes a memory, the rest is read raw."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.cache import FitCache, Memo, Placed, place, stand_for
from longfit.compressors import Encoded, KeepAll, LearnedCompressor
from longfit.errors import BudgetError, UnsupportedFeatureError

GROWTH_TOKENS = 64
ReadSlots = Callable[[Tensor, list[int]], None]


def compress_context(
    encoder: LearnedCompressor,
    cache: FitCache,
    tokens: Tensor,
    padding: list[int],
    *,
    free: bool,
    answers: bool,
    tell: Callable[[int, int], None],
    read_slots: ReadSlots,
) -> Tensor:
    """Let the encoder make a memory of the context, in an empty cache.

    Args:
        tokens: [B, T], left-padded by `padding` columns; the last `cache.question_tokens` are not context.
        free: there is no budget, and the encoder compresses at its own ratio.
        answers: an answer follows, so that at least one token stays raw to predict it from.
        tell: is told how many tokens are read, and of how many.
        read_slots: reads embeddings [B, M, E], left-padded, into the cache as tokens (soft slots).

    Returns:
        What is left to be read, [B, T].

    Raises:
        BudgetError: no ratio that the compressor can use fits the budget.
        UnsupportedFeatureError: embeddings instead of ids, or rows that cannot be compressed beside each other.
    """
    T, asks = tokens.shape[1], cache.question_tokens
    limit = None if free else cache.ledger.kept_limit(T - min(padding))
    raw = max(asks + encoder.window_tokens, int(answers))
    made = _share(encoder, T, raw, padding, limit, trims=not isinstance(cache.method, KeepAll))
    if made is None:
        return tokens
    if tokens.is_floating_point():
        raise UnsupportedFeatureError(f"{encoder.name} compresses token ids; inputs_embeds have none")
    question = tokens[:, T - asks :] if encoder.query_aware and asks else None
    with (
        encoder.watched(lambda read: tell(read, T)),
        nullcontext() if question is None else encoder.asking(question),
    ):
        _fill(encoder, cache, tokens[:, : made.context], padding, made.ratio, read_slots)
    if cache.encoded is not None and cache.encoded.soft is not None:
        cache.raw_ids = tokens[:, made.context : T - asks]
    return tokens[:, made.context :]


@dataclass
class _Share:
    """How an input is divided: its first `context` columns are compressed at `ratio`, the rest stays raw."""

    context: int
    ratio: int


def _share(
    encoder: LearnedCompressor, tokens: int, rest: int, padding: list[int], limit: int | None, trims: bool
) -> _Share | None:
    """How to divide `tokens` columns of which the last `rest` stay raw; None where nothing is to be compressed.

    Without a limit, a learned compressor compresses every context at its ratio. With one, an input that fits stays raw,
    and else the lowest of its ratios that fits is taken.

    Args:
        padding: columns of left padding of each row.
        limit: entries that a layer may hold; None without a budget.
        trims: another method trims what the memory is read into, so any size will do.

    Raises:
        BudgetError: no ratio that the compressor can use fits the budget.
        UnsupportedFeatureError: rows of the batch too short to be compressed beside others that are not.
    """
    context = tokens - rest
    least_context = encoder.sink_tokens + 1
    short = [p for p in padding if context - p <= least_context]
    if len(short) == len(padding) or (limit is not None and tokens - min(padding) <= limit):
        return None
    if short:
        raise UnsupportedFeatureError(
            f"a row of the batch has {tokens - max(short)} tokens, too few to be compressed by {encoder.name}, and "
            "others are compressed; give rows of such different length one by one"
        )
    if limit is None or trims:
        return _Share(context, encoder.ratio)
    for ratio in encoder.ratios():
        if encoder.slots_for(context, ratio) + rest <= limit:
            return _Share(context, ratio)
    ratio = encoder.ratios()[-1]
    least = encoder.slots_for(context, ratio) + rest
    raise BudgetError(
        f"{tokens:,} tokens become {least:,} at {encoder.name}'s highest ratio of {ratio}, and the budget holds "
        f'{limit:,} a layer; the smallest that would do is "{least} tokens", or an adapter trained for a higher ratio'
    )


@torch.no_grad()
def _fill(
    encoder: LearnedCompressor, cache: FitCache, ids: Tensor, padding: list[int], ratio: int, read_slots: ReadSlots
) -> None:
    """Compress a context into an empty cache.

    Args:
        ids: [B, C] the context, left-padded by `padding` columns.
        ratio: tokens for each slot.

    Raises:
        UnsupportedFeatureError: rows of different length for a method whose memory is read by cross-attention.
    """
    B, C = ids.shape
    if len(set(padding)) == 1:
        encoded = [(slice(0, B), encoder.compress(ids[:, padding[0] :], ratio=ratio))]
    else:
        encoded = [
            (slice(row, row + 1), encoder.compress(ids[row : row + 1, p:], ratio=ratio))
            for row, p in enumerate(padding)
        ]
    place_encoded(encoder, cache, encoded, padding, C, read_slots)


def place_encoded(
    encoder: LearnedCompressor,
    cache: FitCache,
    encoded: list[tuple[slice, Encoded]],
    padding: list[int],
    columns: int,
    read_slots: ReadSlots,
) -> None:
    """Put what rows were compressed to into an empty cache that then has seen `columns` columns."""
    cache.slot_spans = encoded[0][1].sources if len(encoded) == 1 else None
    if encoder.memory == "kv":
        memos = [Memo(rows, _placed(given), given.next_position) for rows, given in encoded]
        place(cache, memos, padding, columns, GROWTH_TOKENS)
        return
    if encoder.memory == "soft":
        slots, before = _padded([given for _, given in encoded])
        cache.ledger.apart = len(encoded) > 1
        if len(encoded) == 1:
            cache.encoded = encoded[0][1]
        read_slots(slots, before)
        stand_for(cache, [(rows, given.sources[:, 1] - 1) for rows, given in encoded], padding, columns)
        return
    if len(encoded) > 1:
        raise UnsupportedFeatureError(
            f"{encoder.name} reads its memory by cross-attention, for rows of equal length only; ask one by one"
        )
    rows, given = encoded[0]
    cache.encoded = given
    nothing = [_nothing(encoder, layer, given) for layer in range(len(cache.own_layers))]
    place(cache, [Memo(rows, nothing, given.next_position)], padding, columns, GROWTH_TOKENS)


def _placed(given: Encoded) -> list[Placed]:
    assert given.layers is not None
    places = given.sources[..., 1] - 1
    return [
        Placed(keys, values, positions, places[..., -positions.shape[-1] :]) for keys, values, positions in given.layers
    ]


def _padded(given: list[Encoded]) -> tuple[Tensor, list[int]]:
    """Soft slots [B, M, E] of all rows, left-padded with zeros, and how many columns of padding each row has."""
    soft = [encoded.soft for encoded in given if encoded.soft is not None]
    most = max(t.shape[1] for t in soft)
    padded = [torch.cat([t.new_zeros(t.shape[0], most - t.shape[1], t.shape[2]), t], 1) for t in soft]
    return torch.cat(padded), [most - t.shape[1] for t in soft for _ in range(t.shape[0])]


def _nothing(encoder: LearnedCompressor, layer: int, given: Encoded) -> Placed:
    """No entries, shaped like those of a layer."""
    config = encoder.backbone.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    backbone = encoder.backbone
    empty = torch.empty(given.rows, heads, 0, size, dtype=backbone.dtype, device=backbone.device)
    none = torch.empty(0, dtype=torch.long, device=backbone.device)
    return Placed(empty, empty, none, none)

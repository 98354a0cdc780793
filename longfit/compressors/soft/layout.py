"""Where slots stand and what they stand for: segments, groups, interleaving, masks. Pure functions."""

import random

import torch
from torch import Tensor


def segment_spans(tokens: int, segment_tokens: int) -> list[tuple[int, int]]:
    """Start and stop of consecutive segments; only the last one may be shorter."""
    return [(start, min(start + segment_tokens, tokens)) for start in range(0, tokens, segment_tokens)]


def random_spans(tokens: int, segments: int, max_tokens: int, rng: random.Random) -> list[tuple[int, int]]:
    """Segments with random boundaries, as AutoCompressor trains: of ceil((tokens - max) / (n - 1)) tokens at least."""
    if segments == 1:
        return [(0, tokens)]
    low = max(-(-(tokens - max_tokens) // (segments - 1)), 2)
    spans, start = [], 0
    for left in range(segments - 1, -1, -1):
        if left == 0:
            stop = tokens
        else:
            most = min(max_tokens, tokens - start - low * left)
            least = max(low, tokens - start - max_tokens * left)
            stop = start + rng.randint(min(least, most), max(least, most))
        spans.append((start, stop))
        start = stop
    return spans


def group_sizes(tokens: int, ratio: int) -> Tensor:
    """ceil(tokens / ratio) near-equal groups [M]: the longer ones first (ARC's `split_integer`)."""
    groups = -(-tokens // ratio)
    if not groups:
        return torch.zeros(0, dtype=torch.long)
    small, longer = divmod(tokens, groups)
    return torch.tensor([small + 1] * longer + [small] * (groups - longer), dtype=torch.long)


def stride_sizes(tokens: int, ratio: int) -> Tensor:
    """Groups [M] of exactly `ratio` tokens; the last one takes the rest."""
    sizes = [ratio] * (tokens // ratio)
    return torch.tensor(sizes + ([tokens % ratio] if tokens % ratio else []), dtype=torch.long)


def pool(vectors: Tensor, sizes: Tensor) -> Tensor:
    """Mean [B, M, E] of consecutive groups of `vectors` [B, T, E]; `sizes` [M] sums to T. In fp32, then cast back."""
    M, T = sizes.shape[0], vectors.shape[1]
    owner = torch.repeat_interleave(torch.arange(M), sizes).to(vectors.device)
    weights = torch.zeros(M, T, device=vectors.device)
    weights[owner, torch.arange(T, device=vectors.device)] = 1.0 / sizes.to(vectors.device)[owner].float()
    return (weights @ vectors.float()).to(vectors.dtype)


def interleaved(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """One slot after every group: where the tokens [T] and where the slots [M] stand in the mixed sequence [T + M]."""
    slots = sizes.cumsum(0) + torch.arange(sizes.shape[0])
    total = int(sizes.sum()) + sizes.shape[0]
    is_slot = torch.zeros(total, dtype=torch.bool)
    is_slot[slots] = True
    return (~is_slot).nonzero().squeeze(-1), slots


def mixed(tokens: Tensor, slots: Tensor, token_places: Tensor, slot_places: Tensor) -> Tensor:
    """[B, T + M, E] from tokens [B, T, E] and slots [B, M, E] at their places."""
    out = tokens.new_zeros(tokens.shape[0], tokens.shape[1] + slots.shape[1], tokens.shape[2])
    out = out.index_copy(1, token_places.to(tokens.device), tokens)
    return out.index_copy(1, slot_places.to(tokens.device), slots.to(tokens.dtype))


def allowed(
    group: Tensor, is_slot: Tensor, *, scope: str, keep_raw: bool, mutual: bool = False, alone: Tensor | None = None
) -> Tensor:
    """Which of T mixed tokens see which: bool [T, T], rows are queries.

    Args:
        group: [T] which span or segment each one belongs to; a slot belongs to the one it stands for; -1 for tokens
            that belong to none and are always seen (but not by slots of scope "span").
        is_slot: bool [T].
        scope: what a slot sees of the tokens before it: "span" (its own group, no other slot), "segment" (its own group
            all earlier slots and what belongs to none) or "all".
        keep_raw: tokens go on seeing the raw tokens of earlier groups; else only their slots.
        mutual: slots of one group see each other both ways.
        alone: bool [T], tokens that see nothing but themselves (the sentinel that opens a span).
    """
    T = group.shape[0]
    before = torch.ones(T, T, dtype=torch.bool, device=group.device).tril()
    same = group[:, None] == group[None]
    free = (group == -1)[None]
    slot_key, slot_query = is_slot[None], is_slot[:, None]
    for_tokens = same | slot_key | free | keep_raw
    for_slots = {
        "span": same & ~slot_key | torch.eye(T, dtype=torch.bool, device=group.device),
        "segment": same | slot_key | free,
        "all": torch.ones_like(same),
    }[scope]
    seen = before & torch.where(slot_query, for_slots, for_tokens)
    if mutual:
        seen = seen | (same & slot_key & slot_query)
    if alone is not None:
        seen = torch.where(alone[:, None], torch.eye(T, dtype=torch.bool, device=group.device), seen)
    return seen

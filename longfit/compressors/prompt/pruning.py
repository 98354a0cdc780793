"""LLMLingua's iterative pruning: each segment is scored in sight of what was kept before it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from longfit.compressors.prompt.lm import LanguageModel
from longfit.compressors.prompt.scored import means


class Prefix:
    """What a model has read so far: ids that always stand before, and the kept ones, the oldest of which go when the
    model's stretch is full.

    Args:
        before: ids that always stand in front.
        room: kept tokens that are read at most.
    """

    def __init__(self, lm: LanguageModel, before: Sequence[int], room: int) -> None:
        self.lm, self.before, self.room = lm, [*lm.opening, *before], room
        self.kept: list[int] = []
        self._read([])

    def _read(self, kept: list[int]) -> None:
        self.cache, self.seen = DynamicCache(), 0
        self.last: Tensor | None = None
        self.kept = []
        self.take(self.before)
        self.kept = []
        self.take(kept)

    def take(self, ids: Sequence[int]) -> None:
        """Read ids that were kept."""
        if not ids:
            return
        if len(self.kept) + len(ids) > self.room and self.kept:
            self._read([*self.kept, *ids][-(self.room // 2) :])
            return
        self.last = self.lm.read_into(self.cache, ids, self.seen)[-1:]
        self.kept += ids
        self.seen += len(ids)

    def losses(self, ids: Sequence[int]) -> Tensor:
        """−log p [n] of ids that would come next; they are not kept."""
        hidden = self.lm.read_into(self.cache, ids, self.seen)
        self.cache.crop(-len(ids))
        if self.last is None:
            return torch.cat([self.lm.unpredicted(), self.lm.surprise(hidden[:-1], ids[1:]).cpu().float()])
        return self.lm.surprise(torch.cat([self.last, hidden[:-1]]), ids).cpu().float()


def prune(
    lm: LanguageModel,
    ids: Sequence[Sequence[int]],
    sizes: Sequence[int],
    shares: Sequence[float],
    room: int,
    segment_tokens: int,
    before: Sequence[int] | None = None,
) -> list[int]:
    """Which words stay.

    Segment by segment, the words of the highest loss stay, as many as the segment's share of the room holds; what
    whole words leave over goes to the next segment. With `before`, a word's score is how much its loss falls when those
    ids stand in front of the text (contrastive perplexity).

    Args:
        ids: of each word, by the scorer's tokenizer.
        sizes: tokens of each word, as the room is counted.
        shares: how much of a word's tokens to keep, on average, relative to the others.
        segment_tokens: the scorer's tokens of a segment.

    Returns:
        Ascending indices of the words that stay.
    """
    total = sum(size * share for size, share in zip(sizes, shares, strict=True))
    scale = room / total if total else 0.0
    kept_room = max(64, lm.stretch - segment_tokens - len(before or ()) - 8)
    prefixes = [Prefix(lm, given, kept_room) for given in ([], before) if given is not None]
    kept: list[int] = []
    owed, used = 0.0, 0
    spans = segments([len(given) for given in ids], segment_tokens)
    for number, (start, stop) in enumerate(spans):
        flat = [token for given in ids[start:stop] for token in given]
        losses = [prefix.losses(flat) for prefix in prefixes] if flat else [torch.zeros(0)]
        scores = losses[0] if len(losses) == 1 else losses[0] - losses[1]
        by_word = means(scores, [len(given) for given in ids[start:stop]]).tolist()
        owed += scale * sum(sizes[at] * shares[at] for at in range(start, stop))
        quota = room - used if number == len(spans) - 1 else min(int(owed + 1e-6), room - used)
        chosen: list[int] = []
        for at in sorted(range(start, stop), key=lambda at: (-by_word[at - start], at)):
            if shares[at] > 0 and sizes[at] <= quota:
                chosen.append(at)
                quota -= sizes[at]
        taken = sum(sizes[at] for at in chosen)
        owed, used = owed - taken, used + taken
        kept += sorted(chosen)
        for prefix in prefixes:
            prefix.take([token for at in sorted(chosen) for token in ids[at]])
    return kept


def segments(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Runs of neighbouring words of at most `most` tokens together."""
    found, start, held = [], 0, 0
    for at, size in enumerate(sizes):
        if at > start and held + size > most:
            found.append((start, at))
            start, held = at, 0
        held += size
    return [*found, (start, len(sizes))] if sizes else []

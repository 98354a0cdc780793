"""Filling a token budget with whole units."""

from collections.abc import Sequence

from longfit.compressors.prompt.passage import Passage
from longfit.compressors.prompt.units import Unit, words


def by_score(units: Sequence[Unit], scores: Sequence[float]) -> list[Unit]:
    """Highest score first; of equals, the earlier."""
    order = sorted(range(len(units)), key=lambda at: (-scores[at], units[at].first))
    return [units[at] for at in order]


def best_words(ranked: Sequence[Unit], room: int) -> list[int]:
    """Places of the tokens of the best words, of at most `room` tokens: a word that no longer fits is passed over."""
    kept: list[int] = []
    for unit in ranked:
        if unit.tokens <= room - len(kept):
            kept += range(unit.first, unit.stop)
        if len(kept) == room:
            break
    return sorted(kept)


def best_sentences(passage: Passage, ranked: Sequence[Unit], room: int) -> list[int]:
    """Places of the tokens of the best units, of at most `room` tokens: of the first that no longer fits, the leading
    whole words."""
    kept: list[int] = []
    for unit in ranked:
        left = room - len(kept)
        if unit.tokens <= left:
            kept += range(unit.first, unit.stop)
            continue
        kept += leading_words(passage, unit, left)
        break
    return sorted(kept)


def leading_words(passage: Passage, unit: Unit, room: int) -> list[int]:
    """Places of the first whole words of a unit, of at most `room` tokens."""
    free = [unit.first <= at < unit.stop for at in range(unit.stop)]
    inside = words(_head(passage, unit.stop), free)
    stop = max((word.stop for word in inside if word.stop - unit.first <= room), default=unit.first)
    return list(range(unit.first, stop))


def _head(passage: Passage, stop: int) -> Passage:
    return Passage(
        passage.ids[:stop], passage.text, passage.starts[:stop], passage.stops[:stop], passage.special[:stop]
    )

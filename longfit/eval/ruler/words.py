"""Word lists in the order that the seed of the original picks from."""

import bisect
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Pairs(Sequence[str]):
    """``sorted({f"{adjective}-{noun}" ...})`` without building its millions of strings.

    Adjectives of which none begins another's pairs make runs of their own; the few others are merged.
    """

    def __init__(self, adjectives: Iterable[str], nouns: Iterable[str]) -> None:
        self._nouns = sorted(set(nouns))
        self._runs: list[list[str]] = []
        for opening in sorted({f"{adjective}-" for adjective in adjectives}):
            if self._runs and opening.startswith(self._runs[-1][0]):
                self._runs[-1].append(opening)
            else:
                self._runs.append([opening])
        self._merged = {i: self._pairs(run) for i, run in enumerate(self._runs) if len(run) > 1}
        self._ends: list[int] = []
        for i in range(len(self._runs)):
            size = len(self._merged[i]) if i in self._merged else len(self._nouns)
            self._ends.append(size + (self._ends[-1] if i else 0))

    def _pairs(self, openings: list[str]) -> list[str]:
        return sorted({opening + noun for opening in openings for noun in self._nouns})

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        run = bisect.bisect_right(self._ends, index)
        place = index - (self._ends[run - 1] if run else 0)
        return self._merged[run][place] if run in self._merged else self._runs[run][0] + self._nouns[place]


@dataclass(frozen=True)
class WordLists:
    """wonderwords' lists, in the order of its files."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]

    def shuffled(self, seed: int) -> list[str]:
        """All words as ``common_words_extraction.py`` orders them."""
        words = sorted({*self.nouns, *self.adjectives, *self.verbs})
        random.Random(seed).shuffle(words)
        return words

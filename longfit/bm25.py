"""BM25, for whatever looks for passages by their words."""

import math
import re
from collections import Counter
from collections.abc import Sequence

TERM = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")


class BM25Index:
    """An index of passages.

    Source: Robertson and Zaragoza 2009, "The probabilistic relevance framework: BM25 and beyond", with the logarithm of
    1 + odds, so that no term counts against a passage: the sum over the query's terms of
    log(1 + (N - n + 0.5) / (n + 0.5)) f (k1 + 1) / (f + k1 (1 - b + b length / mean length)).

    Args:
        texts: the passages.
        k1, b: saturation of a term's frequency, and how much a passage's length counts.
    """

    def __init__(self, texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> None:
        self.k1, self.b = k1, b
        self.counts = [Counter(terms(text)) for text in texts]
        self.lengths = [sum(count.values()) for count in self.counts]
        self.mean = max(1.0, sum(self.lengths) / max(1, len(self.lengths)))
        self.holders = Counter(term for count in self.counts for term in count)

    def scores(self, query: str) -> list[float]:
        """The score of every passage; higher is nearer."""
        scores, n = [0.0] * len(self.counts), len(self.counts)
        for term in sorted(set(terms(query))):
            if held := self.holders[term]:
                rarity = math.log(1 + (n - held + 0.5) / (held + 0.5))
                for place, (count, length) in enumerate(zip(self.counts, self.lengths, strict=True)):
                    if f := count[term]:
                        damped = f + self.k1 * (1 - self.b + self.b * length / self.mean)
                        scores[place] += rarity * f * (self.k1 + 1) / damped
        return scores


def terms(text: str) -> list[str]:
    """Words and numbers in small letters; of a script without spaces, each letter."""
    found = []
    for word in TERM.findall(text.lower()):
        found += list(word) if any(map(spaceless, word)) else [word]
    return found


def spaceless(character: str) -> bool:
    """Whether a character belongs to a script that is written without spaces (Chinese, Japanese, Thai, ...)."""
    code = ord(character)
    return (
        0x2E80 <= code <= 0xA4CF  # CJK, kana, bopomofo, Yi, with their punctuation
        or 0xF900 <= code <= 0xFAFF
        or 0xFF00 <= code <= 0xFFEF
        or 0x20000 <= code <= 0x3FFFF
        or 0x0E00 <= code <= 0x0EFF  # Thai, Lao
        or 0x1000 <= code <= 0x109F  # Burmese
        or 0x1780 <= code <= 0x17FF  # Khmer
    )

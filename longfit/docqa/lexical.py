"""Words that an answer shares with a passage: BM25 to find passages, and the check that the answer stands there."""

import math
import re
from collections import Counter
from collections.abc import Sequence

from rapidfuzz import fuzz, process

TERM = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")
# Saturation of a term's frequency and weight of a passage's length, as Robertson and Zaragoza (2009) advise.
K1, B = 1.5, 0.75
ALIKE = 85
LEAST_FUZZY = 5
# Words that say nothing by themselves.
STOPWORDS = """
a an and are as at be been but by can could did do does for from had has have he her him his i if in into is
it its may not of on or our she so some such that the their them then there these they this those to was we
were what when where which who whom whose why will with would you your yes no also s t how
"""


def terms(text: str) -> list[str]:
    """Words and numbers in small letters; of a script without spaces, each character."""
    found = []
    for word in TERM.findall(text.lower()):
        found += list(word) if ord(word[0]) >= 0x2E80 else [word]
    return found


class BM25:
    """An index of passages.

    Source: Robertson and Zaragoza 2009, "The probabilistic relevance framework: BM25 and beyond", with the logarithm of
    1 + odds, so that no term counts against a passage.
    """

    def __init__(self, texts: Sequence[str]) -> None:
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
                        scores[place] += rarity * f * (K1 + 1) / (f + K1 * (1 - B + B * length / self.mean))
        return scores


def stands_in(answer: str, passage: str, question: str = "", share: float = 0.8) -> bool:
    """Whether the names, numbers and other words that say something in an answer stand in a passage.

    Words of the question say nothing, unless the answer has no others. Long words may differ a little (an ending, a
    letter); numbers and short words may not, and every number has to be there. It is a check of words, not of sense: an
    answer that turns a sentence into its opposite passes.

    Args:
        share: the fraction of the words that has to be found.
    """
    stopwords = STOPWORDS.split()
    said = [word for word in dict.fromkeys(terms(answer)) if word not in stopwords]
    asked = terms(question)
    sought = [word for word in said if not _among(word, asked)] or said
    there = terms(passage)
    found = [_among(word, there) for word in sought]
    numbers = all(hit for word, hit in zip(sought, found, strict=True) if word[0].isdigit())
    return bool(sought) and numbers and sum(found) >= share * len(sought)


def _among(word: str, words: list[str]) -> bool:
    if word in words:
        return True
    if word[0].isdigit() or len(word) < LEAST_FUZZY:
        return False
    near = [other for other in words if len(other) >= LEAST_FUZZY]
    return process.extractOne(word, near, scorer=fuzz.ratio, score_cutoff=ALIKE) is not None

"""Common words: cwe (``scripts/data/synthetic/common_words_extraction.py``), ten common words, one example."""

import random
from collections.abc import Callable

from longfit.eval.ruler.draft import Draft, RandomMaker, Surroundings

HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
TAIL = "Question: What are the 10 most common words in the above list?"
ANSWER_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10
TRIED_WORDS = 4096


class CommonWordsMaker(RandomMaker):
    """Makes cwe's samples; a haystack's unit is a different word.

    Args:
        words: the first source of words, already shuffled.
        more_words: the second, read only where the first is too small.
    """

    step = 10

    def __init__(
        self, around: Surroundings, length: int, seed: int, words: list[str], more_words: Callable[[], list[str]]
    ) -> None:
        super().__init__(around, seed)
        self.words, self.more_words = words, more_words
        self.example, self.repeats = ((20, 3, 1), (6, 1)) if length < 4096 else ((40, 10, 3), (30, 3))

    def upper_bound(self, length: int) -> int:
        return int(length // (self.tried(TRIED_WORDS) / TRIED_WORDS)) * 2

    def draft(self, index: int, units: int) -> Draft:
        example, shown = self._list(*self.example)
        context, common = self._list(units, *self.repeats)
        # The original shows the example as a whole conversation: its turn, the model's answer, then the real one.
        turn = HEAD + example + "\n" + TAIL + self.around.after + ANSWER_PREFIX + " " + _numbered(shown)
        head = turn + "\n" + self.around.before + HEAD
        return Draft(head, context + "\n", TAIL, ANSWER_PREFIX, tuple(common))

    def _list(self, count: int, common_repeats: int, other_repeats: int) -> tuple[str, list[str]]:
        source = self.words if count <= len(self.words) else self.more_words()
        drawn = self.random.sample(source, count)
        words = drawn[:COMMON] * common_repeats + drawn[COMMON:] * other_repeats
        random.Random(self.seed).shuffle(words)
        return _numbered(words), drawn[:COMMON]


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))

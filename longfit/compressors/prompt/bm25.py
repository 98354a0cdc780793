"""BM25: the sentences that share words with the question."""

from dataclasses import dataclass

from longfit.bm25 import BM25Index
from longfit.compressors.prompt.base import PromptCompressor, Question
from longfit.compressors.prompt.budgets import best_sentences, by_score
from longfit.compressors.prompt.passage import Passage
from longfit.compressors.prompt.units import sentences
from longfit.errors import InputError


@dataclass
class BM25(PromptCompressor):
    """Keeps the sentences with the highest BM25 score for the question, in the order of the text.

    Source: Robertson and Zaragoza 2009, "The probabilistic relevance framework". The inverse document frequency is
    log(1 + (N - n + 0.5) / (n + 0.5)), which is never negative.

    Deviations: terms are lower-cased words without stemming; letters of scripts without spaces are terms by themselves.

    Attributes (options):
        k1, b: saturation of a term's frequency, and how much a sentence's length counts.
    """

    name = "bm25"
    source = "Robertson and Zaragoza 2009, The probabilistic relevance framework: BM25 and beyond"
    summary = "sentences that share rare words with the question"
    scores = "sentences, by BM25"
    deviations = "no stemming"
    query_aware = True

    k1: float = 1.5
    b: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k1 < 0 or not 0 <= self.b <= 1:
            raise InputError(f"{self.name}: k1 has to be at least 0 and b from 0 to 1, got {self.k1} and {self.b}")

    def choose(self, passage: Passage, free: list[bool], question: Question | None, room: int) -> list[int]:
        """See `PromptCompressor.choose`."""
        assert question is not None
        units = sentences(passage, free)
        scores = BM25Index([passage.said(*unit) for unit in units], self.k1, self.b).scores(question.text)
        return best_sentences(passage, by_score(units, scores), room)

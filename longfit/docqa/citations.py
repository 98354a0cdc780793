"""Where an answer comes from: passages of the documents, ranked without asking the model for its word."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longfit.bm25 import BM25Index
from longfit.docqa.document import Document
from longfit.docqa.kept import Kept
from longfit.docqa.lexical import stands_in
from longfit.docqa.likelihood import lifts
from longfit.docqa.passages import Passage, passages

CANDIDATES = 10
BM25_WEIGHT = 4.0


@dataclass(frozen=True)
class Citation:
    """A passage that an answer rests on.

    Attributes:
        document: the document's name.
        page: the page that the passage begins on; None where the format has none.
        start, end: the passage in the document's text, in characters.
        quote: the passage.
        score: what it was ranked by; higher is better.
        verified: the answer, or what of it can be looked up, stands in the passage.
        kept: the fraction of the passage that the memory still holds, over layers, heads and tokens; None if unknown.
    """

    document: str
    page: int | None
    start: int
    end: int
    quote: str
    score: float
    verified: bool
    kept: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self)


def cite(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    question: str,
    answer: str,
    *,
    n: int = 3,
    kept: Kept | None = None,
    before_each: Callable[[], None] | None = None,
) -> list[Citation]:
    """The passages that an answer rests on, best first.

    The passages that share the rarest words with question and answer (BM25) are candidates. Each is scored by how much
    it raises the likelihood of the answer for the base model, and by its BM25; see `ranked`. Where the answer stands in
    none of them, it says nothing of where it comes from: then these are the passages nearest to the question, by BM25
    alone.

    Args:
        model: a model from `longfit.wrap`, or any causal LM.
        tokenizer: its tokenizer.
        documents: what was read.
        question, answer: text.
        n: citations at most.
        kept: what the memory kept of each token, where that is known.
        before_each: called before each batch of passages goes through the model; what it raises ends the search.

    Returns:
        Up to `n`; none where the answer is empty, or no word of it and of the question stands in the documents.
    """
    if n < 1 or not answer.strip():
        return []
    found = candidates(documents, question, answer)
    texts = [candidate.passage.text for candidate in found]
    if any(stands_in(answer, text, question) for text in texts):
        raised = lifts(model, tokenizer, texts, question, answer, before_each)
        best = ranked([candidate.bm25 for candidate in found], raised)
    else:
        found = candidates(documents, question, "", n) or found
        best = [(place, candidate.bm25) for place, candidate in enumerate(found)]
    return [_citation(documents, found[place].passage, score, question, answer, kept) for place, score in best[:n]]


@dataclass(frozen=True)
class Candidate:
    """A passage, and its BM25 for the question and the answer together."""

    passage: Passage
    bm25: float


def candidates(documents: Sequence[Document], question: str, answer: str, most: int = CANDIDATES) -> list[Candidate]:
    """The passages nearest in words to a question and its answer, nearest first."""
    every = passages(documents)
    scores = BM25Index([passage.text for passage in every]).scores(f"{question} {answer}")
    order = sorted(range(len(every)), key=lambda place: (-scores[place], place))[:most]
    return [Candidate(every[place], scores[place]) for place in order if scores[place] > 0]


def ranked(bm25: Sequence[float], raised: Sequence[float], weight: float = BM25_WEIGHT) -> list[tuple[int, float]]:
    """Place and score of each candidate, best first: the lift in nats, and BM25 as a share of the best.

    Which of the two ranks better, and how they are weighed, was measured (docs/docqa.md).
    """
    most = max(bm25, default=1.0)
    scores = [lift + weight * lexical / most for lexical, lift in zip(bm25, raised, strict=True)]
    return sorted(enumerate(scores), key=lambda item: -item[1])


def _citation(
    documents: Sequence[Document], passage: Passage, score: float, question: str, answer: str, kept: Kept | None
) -> Citation:
    document = documents[passage.document]
    return Citation(
        document=document.name,
        page=document.page_of(passage.start),
        start=passage.start,
        end=passage.end,
        quote=passage.text,
        score=score,
        verified=stands_in(answer, passage.text, question),
        kept=None if kept is None else kept.of_span(passage.start, passage.end, passage.document),
    )

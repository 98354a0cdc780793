"""Where an answer comes from: passages of the documents, ranked without asking the model for its word."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longfit.docqa.document import Document


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
) -> list[Citation]:
    """The passages that an answer rests on, best first.

    Args:
        model: a model from `longfit.wrap`, or any causal LM.
        tokenizer: its tokenizer.
        documents: what was read.
        question, answer: text.
        n: citations at most.
    """
    raise NotImplementedError

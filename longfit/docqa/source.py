"""What a model reads before a question: documents joined to one text, and where each token of it lies."""

import bisect
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from longfit.docqa.document import Document, Page
from longfit.errors import MemoryFileError


@dataclass(frozen=True)
class Source:
    """The text behind a context, so that an answer can be traced to it.

    Attributes:
        text: everything that was tokenised: a template's head, the documents, what stands between them.
        documents: in the order in which they were read.
        places: where the text of each begins in `text`.
        token_starts: where each token of the context begins in `text`, T of them, never falling; tokens that share a
            character share its start. Empty where the tokenizer cannot say.
    """

    text: str
    documents: tuple[Document, ...]
    places: tuple[int, ...]
    token_starts: tuple[int, ...] = ()

    def characters_of(self, token: int) -> tuple[int, int]:
        """Start and end in `text` of the token at column `token` of the context."""
        start = self.token_starts[token]
        after = bisect.bisect_right(self.token_starts, start)
        return start, self.token_starts[after] if after < len(self.token_starts) else len(self.text)

    def tokens_of(self, document: int, start: int, end: int) -> tuple[int, int]:
        """First column, and the one after the last, of the tokens that hold characters start to end of a document."""
        at = self.places[document]
        first = bisect.bisect_left(self.token_starts, self._token_start(at + start))
        return first, bisect.bisect_left(self.token_starts, at + end)

    def _token_start(self, place: int) -> int:
        """Where the token that holds the character at `place` begins."""
        return self.token_starts[max(0, bisect.bisect_right(self.token_starts, place) - 1)]

    def added(self, other: "Source") -> "Source":
        """This context with another read after it, each tokenised by itself."""
        shift = len(self.text)
        return Source(
            self.text + other.text,
            self.documents + other.documents,
            self.places + tuple(place + shift for place in other.places),
            self.token_starts + tuple(start + shift for start in other.token_starts),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the text once, and the documents as stretches of it."""
        return {
            "text": self.text,
            "documents": [
                {"name": d.name, "place": place, "length": len(d.text), "pages": [[p.start, p.end] for p in d.pages]}
                for d, place in zip(self.documents, self.places, strict=True)
            ],
            "token_steps": [b - a for a, b in pairwise((0, *self.token_starts))],
        }

    @classmethod
    def from_dict(cls, given: Any) -> "Source":
        """
        Raises:
            MemoryFileError: it is not what `to_dict` gives.
        """
        try:
            text, places, documents = given["text"], [], []
            for known in given["documents"]:
                place, length = known["place"], known["length"]
                if not 0 <= place <= place + length <= len(text):
                    raise ValueError(f"a document at {place} of {length} characters, in {len(text)}")
                pages = tuple(Page(i + 1, start, end) for i, (start, end) in enumerate(known["pages"]))
                if any(not 0 <= page.start <= page.end <= length for page in pages):
                    raise ValueError("a page outside its document")
                places.append(place)
                documents.append(Document(str(known["name"]), text[place : place + length], pages))
            steps = given["token_steps"]
            if any(not isinstance(step, int) or step < 0 for step in steps) or sum(steps) > len(text):
                raise ValueError("tokens outside the text")
            return cls(text, tuple(documents), tuple(places), tuple(accumulate(steps)))
        except (KeyError, TypeError, ValueError) as error:
            raise MemoryFileError(f"the documents of this memory are not as longfit writes them: {error}") from error

"""A document as text, with the pages that it came in."""

import bisect
from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """Characters `start` to `end` of a document's text are page `number`, counted from 1 as they come in the file."""

    number: int
    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """The text of one document.

    Attributes:
        name: what to call it: a file's name, as a rule.
        text: what is read, without white space at either end.
        pages: in order, without overlap; empty where the format has none.
    """

    name: str
    text: str
    pages: tuple[Page, ...] = ()

    def page_of(self, offset: int) -> int | None:
        """The number of the page that the character at `offset` is on; None where there are no pages."""
        at = bisect.bisect_right(self.pages, offset, key=lambda page: page.start) - 1
        return self.pages[max(0, at)].number if self.pages else None

"""Documents in passages of some 60 to 120 words: what can be cited."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longfit.docqa.document import Document

LEAST_WORDS, MOST_WORDS = 60, 120
MOST_CHARACTERS = 900
PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")
SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*\s+|[\u3002\uff01\uff1f]")
WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Passage:
    """Characters `start` to `end` of the text of a document, counted from 0 in the documents it came with."""

    document: int
    start: int
    end: int
    text: str


def passages(documents: Sequence[Document]) -> list[Passage]:
    """All passages of documents, in order: short paragraphs together, long ones cut between sentences.

    None crosses the end of a page, so that its page is true.
    """
    return [
        Passage(number, start, end, document.text[start:end])
        for number, document in enumerate(documents)
        for page_start, page_end in _stretches(document)
        for start, end in _gathered(document.text, page_start, page_end)
    ]


def _stretches(document: Document) -> list[tuple[int, int]]:
    return [(page.start, page.end) for page in document.pages] or [(0, len(document.text))]


def _gathered(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Spans of passages from start to end of a text."""
    first, last, words = start, start, 0
    for begin, stop, opens in _units(text, start, end):
        more = len(WORD.findall(text, begin, stop))
        too_much = words + more > MOST_WORDS or stop - first > MOST_CHARACTERS
        if words and (too_much or (opens and words >= LEAST_WORDS)):
            yield first, last
            words = 0
        first = begin if not words else first
        last, words = stop, words + more
    if words:
        yield first, last


def _units(text: str, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Sentences, those that are too long in pieces; True for the first of a paragraph."""
    for first, last in _between(PARAGRAPH_END, text, start, end):
        opens = True
        for at, stop in _between(SENTENCE_END, text, first, last):
            for piece in _pieces(text, at, stop):
                yield *piece, opens
                opens = False


def _between(ends: re.Pattern[str], text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The stretches from start to end that these ends close."""
    for found in ends.finditer(text, start, end):
        yield start, found.end()
        start = found.end()
    if start < end:
        yield start, end


def _pieces(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """A sentence, cut after so many words or characters where it is longer."""
    first, last, words = start, start, 0
    for word in WORD.finditer(text, start, end):
        if words and (words == MOST_WORDS or word.end() - first > MOST_CHARACTERS):
            yield first, last
            first, words = word.start(), 0
        last, words = word.end(), words + 1
        while last - first > MOST_CHARACTERS:  # a script without spaces
            yield first, first + MOST_CHARACTERS
            first += MOST_CHARACTERS
    if last > first:
        yield first, last

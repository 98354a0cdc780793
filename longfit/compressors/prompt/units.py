"""Words, phrases and sentences as stretches of tokens, and what of a prompt is never cut."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from longfit.bm25 import spaceless
from longfit.compressors.prompt.passage import Passage

WORD_TOKENS = 32  # longer runs without a space (addresses, base64) are cut
SENTENCE_TOKENS = 128
HEADER_TOKENS = 256  # the longest instructions before the first turn that stay as they are
INSTRUCTING = ("system", "developer")
ROLE_LETTERS = 40  # the rest of a mark's line, if so short and one word, names a role
ENDS = ".!?…"
FULL_ENDS = "。！？"  # noqa: RUF001
CLOSING = "\"')]}»”’」』）"  # noqa: RUF001
PAUSES = tuple(",;:、，；：")  # noqa: RUF001
ABBREVIATIONS = frozenset(
    """mr mrs ms dr prof st jr sr vs etc e.g i.e cf al fig no vol pp inc ltd co gen col lt sen rep gov u.s
    u.k""".split()  # noqa: SIM905
)
# Words that open a phrase: the noun chunks of a parser begin about there.
FUNCTION_WORDS = frozenset(
    """a an the this that these those my your his her its our their and or but nor so yet of in on at by for from to
    with into onto over under after before between through during about against among within without as if when while
    where which who whom whose because although though than then is are was were be been being has have had do does
    did will would can could shall should may might must not he she it they we you i""".split()  # noqa: SIM905
)


class Unit(NamedTuple):
    """The tokens `first` to `stop` - 1."""

    first: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.first


def words(passage: Passage, free: Sequence[bool]) -> list[Unit]:
    """Whole words: runs of free tokens without a space inside, each with the spaces before it. A letter of a script
    that is written without spaces is a word by itself."""
    found: list[Unit] = []
    first: int | None = None
    for at in range(len(passage)):
        ended = not free[at] or (first is not None and not passage.splits(at) and _opens_word(passage, at, first))
        if first is not None and ended:
            found.append(Unit(first, at))
            first = None
        if first is None and free[at]:
            first = at
    return found if first is None else [*found, Unit(first, len(passage))]


def _opens_word(passage: Passage, at: int, first: int) -> bool:
    text, start = passage.text, passage.starts[at]
    if passage.stops[at] == start or not passage.said(first, at).strip():
        return False  # nothing is said, or only spaces so far: they belong to what follows
    before, here = text[start - 1], text[start]
    return before.isspace() or here.isspace() or spaceless(before) or spaceless(here) or at - first >= WORD_TOKENS


def joined(passage: Passage, units: list[Unit], ends: Callable[[str, str], bool], most_tokens: int) -> list[Unit]:
    """Neighbouring units made into longer ones: one ends where `ends(its text so far, the next unit's text)`, or where
    it would pass `most_tokens`."""
    found: list[Unit] = []
    for unit in units:
        if found and found[-1].stop == unit.first:
            last = found[-1]
            together = unit.stop - last.first <= most_tokens
            if together and not ends(passage.said(*last), passage.said(*unit)):
                found[-1] = Unit(last.first, unit.stop)
                continue
        found.append(unit)
    return found


def sentences(passage: Passage, free: Sequence[bool], most_tokens: int = SENTENCE_TOKENS) -> list[Unit]:
    """Whole sentences, of whole words; longer ones are cut between words."""
    return joined(passage, words(passage, free), _ends_sentence, most_tokens)


def _ends_sentence(said: str, following: str) -> bool:
    gap = said[len(said.rstrip()) :] + following[: len(following) - len(following.lstrip())]
    if gap.count("\n") >= 2:
        return True
    bare = said.rstrip().rstrip(CLOSING)
    opening = following.strip()[:1]
    if not bare or following[:1] in (*CLOSING, *ENDS, *FULL_ENDS):
        return False
    if bare[-1] in FULL_ENDS:
        return True
    if bare[-1] not in ENDS or not gap or opening.islower():
        return False
    word = bare.split()[-1].rstrip(ENDS).lstrip("([\"'").lower()
    return not (bare[-1] == "." and (word in ABBREVIATIONS or (len(word) == 1 and word.isalpha())))


def phrases(passage: Passage, free: Sequence[bool], most_tokens: int = 16) -> list[Unit]:
    """Short phrases: from a function word or after a punctuation mark to the next."""
    return joined(passage, words(passage, free), _ends_phrase, most_tokens)


def _ends_phrase(said: str, following: str) -> bool:
    if _ends_sentence(said, following):
        return True
    opens = following.strip().lower() in FUNCTION_WORDS
    last = said.split()[-1].lower() if said.split() else ""
    return said.rstrip()[-1:] in PAUSES or (opens and last not in FUNCTION_WORDS)


LEVELS: dict[str, Callable[[Passage, Sequence[bool]], list[Unit]]] = {
    "word": words,
    "phrase": phrases,
    "sentence": sentences,
}


def fixed(passage: Passage) -> list[bool]:
    """Which tokens are the prompt's frame and stay: the tokenizer's own marks with the name of a role behind them, and
    what a chat template puts before the first turn of the user."""
    found = list(passage.special)
    header = 0
    for at in (at for at, mark in enumerate(passage.special) if mark):
        stop = _role_line(passage, at)
        found[at:stop] = [True] * (stop - at)
        role = passage.said(at + 1, stop).strip().lower()
        if not at or header == at:  # the prompt begins with it, or with the instructions before it
            header = _next_opening(passage, stop) if role.startswith(INSTRUCTING) else 0
            found[:header] = [True] * header
    return found


def _role_line(passage: Passage, mark: int) -> int:
    """The token after the line that a mark begins, where that is empty or names a role; else the one after the mark."""
    for stop in range(mark + 1, min(mark + 1 + ROLE_LETTERS, len(passage))):
        if "\n" in passage.said(stop, stop + 1):
            line = passage.said(mark + 1, stop + 1).strip()
            return stop + 1 if len(line) <= ROLE_LETTERS and len(line.split()) <= 1 else mark + 1
    return mark + 1


def _next_opening(passage: Passage, start: int) -> int:
    """The next mark with a role behind it, where the header may end; 0 if there is none near."""
    for at in range(start, min(HEADER_TOKENS, len(passage))):
        if passage.special[at] and passage.said(at + 1, _role_line(passage, at)).strip():
            return at
    return 0

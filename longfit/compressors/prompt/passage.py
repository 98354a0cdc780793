"""Token ids as text: which characters each token stands for."""

from dataclasses import dataclass
from typing import Any

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character yet
LONGEST_CHARACTER = 8  # tokens: an emoji with modifiers may take as many


@dataclass(frozen=True)
class Passage:
    """A text as token ids, with the characters of every token.

    The text is what the tokens say one by one, so every token has its place in it whatever the tokenizer would make of
    the text now. Tokens that share a character (bytes of one letter) share its span.

    Attributes:
        ids: of the text.
        text: what they say.
        starts, stops: for each token its first character and the one after its last.
        special: whether a token is one of the tokenizer's own (an end of turn, say).
    """

    ids: list[int]
    text: str
    starts: list[int]
    stops: list[int]
    special: list[bool]

    @classmethod
    def of(cls, tokenizer: Any, ids: list[int]) -> "Passage":
        """Decode `ids`; O(n), with one call of the tokenizer for each different id."""
        pieces = _pieces(tokenizer, ids)
        starts, stops, at = [], [], 0
        for piece, tokens in pieces:
            starts += [at] * tokens
            at += len(piece)
            stops += [at] * tokens
        marks = set(tokenizer.all_special_ids)
        return cls(list(ids), "".join(piece for piece, _ in pieces), starts, stops, [i in marks for i in ids])

    def __len__(self) -> int:
        return len(self.ids)

    def said(self, first: int, stop: int) -> str:
        """The characters of the tokens `first` to `stop` - 1."""
        return self.text[self.starts[first] : self.stops[stop - 1]] if stop > first else ""

    def splits(self, at: int) -> bool:
        """Whether a cut before the token `at` would part the bytes of one character."""
        return 0 < at < len(self) and self.starts[at] == self.starts[at - 1] < self.stops[at]

    def spans(self, places: list[int]) -> list[tuple[int, int]]:
        """Stretches of characters, ascending and apart, that the tokens at the ascending `places` stand for."""
        found: list[tuple[int, int]] = []
        for place in places:
            start, stop = self.starts[place], self.stops[place]
            if found and start <= found[-1][1]:
                found[-1] = (found[-1][0], max(stop, found[-1][1]))
            elif stop > start:
                found.append((start, stop))
        return found


def _pieces(tokenizer: Any, ids: list[int]) -> list[tuple[str, int]]:
    """What consecutive tokens say, with how many tokens say it: one, or those that make up a character together."""
    said: dict[tuple[int, ...], str] = {}
    anchor = _anchor(tokenizer, ids)
    before = len(_decoded(tokenizer, anchor))

    def text(group: tuple[int, ...]) -> str:
        if group not in said:  # decoders drop a space at the start of a text, so something stands before it
            said[group] = _decoded(tokenizer, [*anchor, *group])[before:]
        return said[group]

    pieces, at = [], 0
    while at < len(ids):
        tokens, piece = 1, text((ids[at],))
        while REPLACEMENT in piece and tokens < LONGEST_CHARACTER and at + tokens < len(ids):
            tokens += 1
            piece = text(tuple(ids[at : at + tokens]))
        if REPLACEMENT in piece:  # no character comes of it: broken bytes, or a real replacement character
            tokens, piece = 1, text((ids[at],))
        pieces.append((piece, tokens))
        at += tokens
    return pieces


def _anchor(tokenizer: Any, ids: list[int]) -> list[int]:
    return list(tokenizer("a", add_special_tokens=False)["input_ids"])[:1] or ids[:1]


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def question_of(tokenizer: Any, ids: list[int]) -> str:
    """The question in the tail of a prompt: what follows its last "Question:", up to the line's end, or all of it.

    The end of the turn and the opening of the answer, which a chat template puts there, are left out.
    """
    passage = Passage.of(tokenizer, ids)
    first = next((at for at, mark in enumerate(passage.special) if mark and passage.said(0, at).strip()), len(passage))
    plain = [at for at in range(first) if not passage.special[at]]
    text = "".join(passage.text[start:stop] for start, stop in passage.spans(plain)).strip()
    _, found, asked = text.rpartition("Question:")
    line = asked.strip().partition("\n")[0].strip()
    return line if found and line else text.removesuffix("Answer:").strip() or text

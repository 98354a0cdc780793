"""Tokens of a long text, with where each begins, made in pieces so that memory stays bounded."""

import hashlib
import re
from array import array
from itertools import islice
from typing import Any

from longfit.errors import InputError

PIECE = 1_000_000
# Characters on either side of a cut that have to be tokenised alike with and without it.
AROUND_CUT = 500
TRIES = 20
# A space between two letters: every tokenizer that splits words splits there.
CUT = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


def tokenised(
    tokenizer: Any, text: str, special: bool = False, piece: int = PIECE
) -> tuple[list[int], tuple[int, ...]]:
    """Token ids of a text, and the character that each begins at (none where the tokenizer cannot say).

    A text longer than `piece` characters is tokenised piece by piece; each cut is checked to leave the tokens around
    it as they are.

    Args:
        special: let the tokenizer add its own first tokens.

    Raises:
        InputError: a text that long cannot be cut for this tokenizer.
    """
    ids, starts = array("q"), array("q")
    at = 0
    for stop in [*_cuts(tokenizer, text, piece), len(text)]:
        fast = getattr(tokenizer, "is_fast", False)
        found = tokenizer(
            text[at:stop], add_special_tokens=special and at == 0, return_offsets_mapping=fast, verbose=False
        )
        ids.extend(found["input_ids"])
        starts.extend(at + start for start, _ in found.get("offset_mapping", ()))
        at = stop
    return ids.tolist(), _rising(starts)


def _rising(starts: array) -> tuple[int, ...]:
    """The starts with those of special tokens, which stand nowhere, where the text before them ends."""
    most = 0
    for place, start in enumerate(starts):
        most = starts[place] = max(most, start)
    return tuple(starts)


def _cuts(tokenizer: Any, text: str, piece: int) -> list[int]:
    cuts, at = [], 0
    while len(text) - at > piece:
        cut = None
        for found in islice(CUT.finditer(text, at + piece - piece // 4, at + piece), TRIES):
            if _harmless(tokenizer, text, found.start()):
                cut = found.start()
                break
        if cut is None:
            raise InputError(
                f"a text of {len(text):,} characters is tokenised in pieces of {piece:,}, and between {at:,} and "
                f"{at + piece:,} there is no place where this tokenizer lets it be cut; give it in smaller files"
            )
        cuts.append(cut)
        at = cut
    return cuts


def _harmless(tokenizer: Any, text: str, cut: int) -> bool:
    def ids(start: int, stop: int) -> list[int]:
        return list(tokenizer(text[start:stop], add_special_tokens=False, verbose=False)["input_ids"])

    start, stop = cut - AROUND_CUT, cut + AROUND_CUT
    return ids(start, cut) + ids(cut, stop) == ids(start, stop)


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what decides the tokens of a prompt: the vocabulary, its rules and the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    template = getattr(tokenizer, "chat_template", None) or ""
    return f"sha256:{hashlib.sha256(f'{rules}{template}'.encode()).hexdigest()[:16]}"

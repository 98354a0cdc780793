"""LongBench's prompts: the official text, cut in the middle by the official rule, split into context and question.

``dataset2prompt.json``, ``dataset2maxlen.json`` and ``v2_0shot.txt`` are THUDM/LongBench's own files
(``LongBench/config/``, ``prompts/0shot.txt``, commit 2e00731f8d0b; MIT licence), unchanged.
"""

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from longfit.errors import InputError

RESERVED_TOKENS = 500


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


TEMPLATES: dict[str, str] = json.loads(_read("dataset2prompt.json"))
MAX_NEW_TOKENS: dict[str, int] = json.loads(_read("dataset2maxlen.json"))
V2_TEMPLATE = _read("v2_0shot.txt")


@dataclass(frozen=True)
class Parts:
    """A prompt as ``head + content + tail``: instruction, what is read, what is asked.

    Attributes:
        truncated: tokens were cut out of the middle.
        question_cut: the cut reached the question, and `tail` is only what followed the cut.
    """

    head: str
    content: str
    tail: str
    truncated: bool = False
    question_cut: bool = False

    @property
    def text(self) -> str:
        return self.head + self.content + self.tail


def fill(task: str, row: dict[str, Any]) -> Parts:
    """The official prompt of a v1 row. The question follows the context in all 21 templates."""
    head, tail = TEMPLATES[task].split("{context}")
    return Parts(head, row["context"], tail.replace("{input}", row["input"]))


def fill_v2(row: dict[str, Any]) -> Parts:
    """The official zero-shot prompt of a v2 row; marks like ``$Q$`` inside a text are replaced too, as officially."""
    head, tail = V2_TEMPLATE.split("$DOC$")
    content = row["context"].strip()
    for mark, name in [("$Q$", "question"), *((f"$C_{c}$", f"choice_{c}") for c in "ABCD")]:
        content, tail = (text.replace(mark, row[name].strip()) for text in (content, tail))
    return Parts(head, content, tail)


def shorten(tokenizer: Any, parts: Parts, length: int, *, halves_apart: bool = True) -> Parts:
    """The prompt for a model of `length` tokens: one of more than ``length - 500`` loses its middle.

    Half of ``length - 500`` tokens stays at each end. v1 decodes the ends apart (``LongBench/pred.py``), v2 together
    (``pred.py``). The text equals the official one; what is found in it is where the question begins.

    Raises:
        InputError: `length` leaves no room for the instruction at the prompt's head.
    """
    limit = length - RESERVED_TOKENS
    if limit < 2:
        raise InputError(
            f"length {length} leaves no prompt: {RESERVED_TOKENS} tokens are reserved for the answer; raise it"
        )
    ids = tokenizer(parts.text)["input_ids"]
    if len(ids) <= limit:
        return parts
    start = ids[: limit // 2]
    end = ids[-(limit // 2) :] if halves_apart else ids[-limit // 2 :]
    last = _decode(tokenizer, end)
    text = _decode(tokenizer, start) + last if halves_apart else _decode(tokenizer, start + end)
    heads = [head for head in _spellings(tokenizer, parts.head) if text.startswith(head)]
    if not heads:
        raise InputError(f"length {length} cannot hold the task's instruction; raise it")
    tails = [tail for tail in _spellings(tokenizer, parts.tail) if last.endswith(tail)]
    tail = tails[0] if tails else last
    if not text.endswith(tail):
        # v2 decodes both ends together, which may spell the first characters after the cut differently.
        tail = _common_end(text, tail)
    return Parts(heads[0], text[len(heads[0]) : len(text) - len(tail)], tail, True, not tails)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _spellings(tokenizer: Any, text: str) -> tuple[str, ...]:
    """The text, and how the tokenizer gives it back, which is not the same for every tokenizer."""
    back = _decode(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    return (text, back) if back else (text,)


def _common_end(first: str, second: str) -> str:
    size = 0
    while size < min(len(first), len(second)) and first[-size - 1] == second[-size - 1]:
        size += 1
    return first[len(first) - size :]

"""Questions to one memory, one after the other, from lines of text."""

from collections.abc import Callable, Iterable
from typing import Any

from longfit.docqa.asking import Answer, ask_memory, cited, kept_of, source_of
from longfit.docqa.shown import citations_text
from longfit.errors import LongfitError
from longfit.memory import Memory

HELP = "a question, or: /cite where the last answer comes from, /info what is kept, /help this, /quit the end"


def chat(
    model: Any,
    tokenizer: Any,
    memory: Memory,
    lines: Iterable[str],
    say: Callable[[str], None],
    *,
    max_new_tokens: int = 64,
    citations: int = 3,
) -> int:
    """Answer each line; stop at /quit or the end of the lines. Returns how many questions were answered.

    Every question is asked to the memory by itself, as `longfit ask` does: nothing is read again, no answer depends on
    the questions before it, and the memory does not change. A question that cannot be answered is refused in one line,
    and the next is asked.
    """
    last: tuple[str, Answer] | None = None
    answered = 0
    for line in lines:
        asked = line.strip()
        if asked == "/quit":
            break
        try:
            if asked == "/cite":
                say(_sources(model, tokenizer, memory, last, citations))
            elif asked == "/info":
                say(f"{memory!r}" if last is None else f"{memory!r}\n{last[1].report}")
            elif asked.startswith("/"):
                say(HELP)
            elif asked:
                answer = ask_memory(model, tokenizer, memory, asked, max_new_tokens=max_new_tokens)
                last, answered = (asked, answer), answered + 1
                say(answer.text)
        except LongfitError as error:
            say(f"error: {' '.join(str(error).split())}")
    return answered


def _sources(model: Any, tokenizer: Any, memory: Memory, last: tuple[str, Answer] | None, citations: int) -> str:
    if last is None:
        return "nothing was asked yet"
    source = source_of(memory)
    answer = cited(model, tokenizer, source, *last, citations, kept_of(memory.cache, source))
    return citations_text(answer.citations)

"""Where the context of a prompt of lm-evaluation-harness ends and its question begins."""

from collections.abc import Mapping
from typing import Any

from longfit.errors import InputError

# Where the question of RULER's templates begins (NVIDIA/RULER, data/synthetic/constants.py), the longer first: a
# question-answering prompt also holds "Question:", and a document may.
QUESTIONS = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nQuestion:",
    "What is the special magic ",
    "What are all the special magic ",
    "Question: Find all variables that are assigned the value",
    "Question: What are the 10 most common words in the above list?",
    "Question: Do not provide any explanation.",
)


def split_request(request: Any, prompt: str, *, guess: bool = False) -> tuple[str, str]:
    """The context and the question of lm-eval's ``prompt``; together they are the prompt.

    A document with `context` (LongBench) is cut where that text ends, one with `question` or `input` within the prompt
    before its last mention; RULER's, whose `input` is the whole prompt, before its template's question. The last
    mention counts, since examples come first.

    Args:
        request: an lm-eval Instance; only its `doc` is read.
        guess: where nothing of that is found, take the last paragraph for the question.

    Raises:
        InputError: the prompt cannot be cut.
    """
    doc = request.doc if isinstance(request.doc, Mapping) else {}
    place = _question_place(doc, prompt)
    if place is None and guess:
        body = prompt.rstrip()
        place = max(body.rfind("\n\n") + 2, 0) if "\n\n" in body else body.rfind("\n") + 1
    if not place or place >= len(prompt):
        raise InputError(
            "cannot tell the context of this prompt from its question: its document has none of LongBench's `context` "
            f"and `question` or RULER's `input` with a known question (fields: {', '.join(map(str, doc)) or 'none'}); "
            "use aware=true, or compressor=full"
        )
    return prompt[:place], prompt[place:]


def _question_place(doc: Mapping[str, Any], prompt: str) -> int | None:
    """The character at which the question begins."""
    context = doc.get("context")
    if isinstance(context, str) and (text := context.rstrip()) and (found := prompt.rfind(text)) >= 0:
        return found + len(text)
    for marker in QUESTIONS:
        if (found := prompt.rfind(marker)) > 0:
            return found
    for field in ("question", "input"):
        text = str(doc.get(field) or "").strip()
        if text and (found := prompt.rfind(text)) > 0:
            return found
    return None

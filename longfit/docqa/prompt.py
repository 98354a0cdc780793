"""The prompt of a question about documents: the context, which is compressed, and what comes after it."""

from collections.abc import Sequence
from typing import Any

from longfit.docqa.document import Document
from longfit.docqa.source import Source
from longfit.docqa.tokens import tokenised
from longfit.errors import InputError

# Stands for the document while a chat template is applied, to find where its text goes.
MARK = "\u27e6document\u27e7"
SEPARATOR = "\n\n"


def split_prompt(tokenizer: Any, document: str, question: str) -> tuple[list[int], list[int]]:
    """Token ids of the context and of what follows it; the prompt is exactly the one after the other.

    The chat template is applied where the tokenizer has one: the document and then the question in one turn
    of the user, and the header of the answer. Otherwise the two are plain text, and "Answer:" follows.

    Raises:
        InputError: the document or the question is empty.
    """
    ids, _ = context_of(tokenizer, [Document("document", document.strip())])
    return ids, question_ids(tokenizer, question)


def context_of(tokenizer: Any, documents: Sequence[Document], first: bool = True) -> tuple[list[int], Source]:
    """Token ids of what comes before a question, and the text behind them.

    One document stands there as it is; before each of several stands its name.

    Args:
        first: the context begins here: with the head of the template, and the tokenizer's own first tokens.

    Raises:
        InputError: no document, or an empty one.
    """
    if not documents:
        raise InputError("there is no document to ask about")
    for document in documents:
        if not document.text.strip():
            raise InputError(f"{document.name}: the document is empty; there is nothing to ask about")
    before, _, special = _around(tokenizer, "?")
    text, places = before if first else "", []
    for document in documents:
        text += f"Document: {document.name}{SEPARATOR}" if len(documents) > 1 or not first else ""
        places.append(len(text))
        text += document.text + SEPARATOR
    ids, starts = tokenised(tokenizer, text, special and first)
    return ids, Source(text, tuple(documents), tuple(places), starts)


def bare_ids(tokenizer: Any) -> list[int]:
    """Token ids of a context without any document."""
    before, _, special = _around(tokenizer, "?")
    return list(tokenizer(before, add_special_tokens=special)["input_ids"])


def question_ids(tokenizer: Any, question: str) -> list[int]:
    """Token ids of what follows a context.

    Raises:
        InputError: the question is empty.
    """
    if not question.strip():
        raise InputError("the question is empty")
    _, after, _ = _around(tokenizer, question.strip())
    return list(tokenizer(after, add_special_tokens=False)["input_ids"])


def _around(tokenizer: Any, question: str) -> tuple[str, str, bool]:
    """What stands before the documents, what after them, and whether the tokenizer is to add its own first tokens."""
    if not getattr(tokenizer, "chat_template", None):
        return "", f"{question}\nAnswer:", True
    turn = [{"role": "user", "content": f"{MARK}{SEPARATOR}{question}"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, found, after = text.partition(f"{MARK}{SEPARATOR}")
    if not found:
        raise InputError(
            "this tokenizer's chat template changes the text of the user's turn, so the question cannot be "
            "told from the document"
        )
    return before, after, False

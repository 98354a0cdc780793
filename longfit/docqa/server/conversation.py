"""From the messages of a chat to token ids, with or without a document before them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from longfit.docqa.prompt import MARK, SEPARATOR
from longfit.errors import InputError


class Message(NamedTuple):
    """A turn: its role ("system", "user" or "assistant") and its text."""

    role: str
    content: str


def conversation_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat alone.

    Raises:
        InputError: no question, or turns that the chat template refuses.
    """
    question_of(messages)
    if getattr(tokenizer, "chat_template", None):
        text = _rendered(tokenizer, messages)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return list(tokenizer(_plain(messages), verbose=False)["input_ids"])


def after_document_ids(tokenizer: Any, messages: Sequence[Message], context: str) -> list[int]:
    """Token ids of a chat whose first turn begins with documents that were read before.

    What a system turn says stands before the first question: the head of the template was read with the documents.

    Args:
        context: the text that was read.

    Raises:
        InputError: no question, turns that the chat template refuses, or one that puts something else first.
    """
    question_of(messages)
    told = [message.content.strip() for message in messages if message.role == "system"]
    turns = [message for message in messages if message.role != "system"]
    if turns[0].role != "user":
        raise InputError(f"the first message is the {turns[0].role}'s; a question to a document begins with the user's")
    first = SEPARATOR.join([*told, turns[0].content.strip()])
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(_plain([Message("user", first), *turns[1:]]), add_special_tokens=False)["input_ids"])
    text = _rendered(tokenizer, [Message("user", f"{MARK}{SEPARATOR}{first}"), *turns[1:]])
    before, found, after = text.partition(f"{MARK}{SEPARATOR}")
    if not found or not context.startswith(before):
        raise InputError("this model's chat template does not begin a chat of several turns as it begins one question")
    return list(tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"])


def question_of(messages: Sequence[Message]) -> str:
    """What is asked: the last message.

    Raises:
        InputError: it is not the user's, or empty.
    """
    if not messages or messages[-1].role != "user":
        raise InputError("the last message has to be the user's question")
    if not messages[-1].content.strip():
        raise InputError("the question is empty")
    return messages[-1].content.strip()


def _rendered(tokenizer: Any, messages: Sequence[Message]) -> str:
    try:
        turns = [message._asdict() for message in messages]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError) as error:
        raise InputError(f"the model's chat template refuses these messages: {error}") from error


def _plain(messages: Sequence[Message]) -> str:
    """As a question is put to a model without a chat template."""
    told = [message.content.strip() for message in messages]
    ends = {"user": "\nAnswer:", "assistant": SEPARATOR, "system": SEPARATOR}
    return "".join(
        f"{' ' if message.role == 'assistant' else ''}{text}{ends[message.role]}"
        for message, text in zip(messages, told, strict=True)
    )

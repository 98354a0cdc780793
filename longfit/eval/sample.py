"""One prompt of an evaluation task, cut where its context ends and its question begins."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longfit.errors import InputError

_SPLIT = "[[longfit: the content stands here]]"


@dataclass(frozen=True)
class Prompt:
    """The text and tokens of a prompt in two parts; ``context_ids + question_ids`` is what the model reads.

    The parts are tokenised apart, so that compressing the context alone and reading the whole prompt see the same
    tokens. ``empty_ids`` are the context's tokens with nothing in the place of the content: the no-context baseline.
    """

    context: str
    question: str
    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    empty_ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One prompt of ``task`` with what a right answer is.

    Attributes:
        index: its number within the task, stable over runs.
        answers: the references; what they mean is the task's business.
        max_new_tokens: the longest answer that the task allows.
        target_ids: for tasks scored by likelihood: the tokens that follow the prompt. Empty where the model generates.
        details: what else the task or a report wants to know (depth, spans, classes), as plain JSON values.
    """

    suite: str
    task: str
    index: int
    prompt: Prompt
    answers: tuple[str, ...]
    max_new_tokens: int
    target_ids: tuple[int, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sample_id(self) -> str:
        return f"{self.task}-{self.index:04d}"

    @property
    def context_ids(self) -> tuple[int, ...]:
        return self.prompt.context_ids

    @property
    def question_ids(self) -> tuple[int, ...]:
        return self.prompt.question_ids

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.prompt.context_ids + self.prompt.question_ids

    @property
    def sha256(self) -> str:
        """Of everything that decides an outcome: tokens, references and the length of an answer."""
        held = [self.context_ids, self.question_ids, self.target_ids, self.answers, self.max_new_tokens]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def make_prompt(
    tokenizer: Any, head: str, content: str, tail: str, *, answer_prefix: str = "", chat: bool = True
) -> Prompt:
    """The prompt ``head + content + tail``, in the tokenizer's chat template where it has one and ``chat`` is true.

    The context is everything up to the end of ``content``; the question is ``tail``, the end of the user's turn, the
    opening of the model's, and ``answer_prefix``, which stands where the model's answer begins.

    Raises:
        InputError: the chat template drops or repeats the user's text.
    """
    before, after = frame(tokenizer, head, tail, answer_prefix=answer_prefix, chat=chat)
    opening = not in_template(tokenizer, chat)
    return Prompt(
        context=before + content,
        question=after,
        context_ids=tokens_of(tokenizer, before + content, opening),
        question_ids=tokens_of(tokenizer, after, False),
        empty_ids=tokens_of(tokenizer, before, opening),
    )


def frame(tokenizer: Any, head: str, tail: str, *, answer_prefix: str = "", chat: bool = True) -> tuple[str, str]:
    """The prompt's text before its content and after it."""
    text = head + _SPLIT + tail
    if in_template(tokenizer, chat):
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    if text.count(_SPLIT) != 1:
        raise InputError("the chat template drops or repeats the user's text; the prompt cannot be cut")
    before, after = text.split(_SPLIT)
    return before, after + answer_prefix


def in_template(tokenizer: Any, chat: bool) -> bool:
    """Whether a prompt is put into a chat template, which then brings the model's opening tokens."""
    return chat and bool(getattr(tokenizer, "chat_template", None))


def tokens_of(tokenizer: Any, text: str, opening: bool) -> tuple[int, ...]:
    """Token ids of ``text``, with the tokenizer's own opening and closing tokens where ``opening``."""
    return tuple(tokenizer(text, add_special_tokens=opening)["input_ids"]) if text else ()

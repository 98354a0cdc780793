"""A question to documents, or to a memory of them, through a wrapped model."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longfit.docqa.citations import Citation, cite
from longfit.docqa.document import Document
from longfit.docqa.prompt import context_of, question_ids
from longfit.docqa.source import Source
from longfit.errors import InputError, MemoryFileError
from longfit.memory import Memory
from longfit.report import FitReport


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: the answer, special tokens left out.
        report: what was kept and spent.
        question_tokens: tokens of the prompt that come after the document.
        citations: the passages that it rests on, best first, where they were asked for.
    """

    text: str
    report: FitReport
    question_tokens: int
    citations: tuple[Citation, ...] = ()


@torch.no_grad()
def ask(
    model: Any,
    tokenizer: Any,
    documents: str | Document | Sequence[Document],
    question: str,
    *,
    aware: bool = True,
    max_new_tokens: int = 64,
    citations: int = 0,
) -> Answer:
    """Ask a wrapped model a question about documents, greedily.

    Args:
        model: a model from `longfit.wrap`.
        tokenizer: its tokenizer.
        documents: text, or what `read_document` gave.
        question: text.
        aware: the question is known while the documents are read, and question-aware methods look at it. If
            False they are compressed first, and the question comes to what was kept.
        max_new_tokens: the longest answer.
        citations: passages to name at most.

    Raises:
        InputError: an empty document or question, or a chat template that hides the question.
        BudgetError: the budget cannot be met for these documents.
    """
    if not aware:
        memory = compress(model, tokenizer, documents)
        return ask_memory(model, tokenizer, memory, question, max_new_tokens=max_new_tokens, citations=citations)
    given = _documents(documents)
    asked = question_ids(tokenizer, question)
    context, _ = context_of(tokenizer, given)
    answer = _answer(model, tokenizer, context, asked, max_new_tokens)
    return _cited(model, tokenizer, given, question, answer, citations)


def compress(model: Any, tokenizer: Any, documents: str | Document | Sequence[Document]) -> Memory:
    """Read documents into a memory, without a question; it remembers them.

    Raises:
        InputError: an empty document.
        BudgetError: the budget cannot be met for these documents.
    """
    context, source = context_of(tokenizer, _documents(documents))
    memory = model.compress(_tensor(model, context))
    return dataclasses.replace(memory, source=source.to_dict())


@torch.no_grad()
def ask_memory(
    model: Any,
    tokenizer: Any,
    memory: Memory,
    question: str,
    *,
    max_new_tokens: int = 64,
    citations: int = 0,
) -> Answer:
    """Ask a wrapped model a question about what `compress` made of documents, greedily. The memory does not change.

    Raises:
        InputError: an empty question.
        FingerprintError: the memory belongs to another model or method.
        MemoryFileError: citations of a memory that does not know its documents.
    """
    answer = _answer(model, tokenizer, [], question_ids(tokenizer, question), max_new_tokens, memory)
    if not citations:
        return answer
    return _cited(model, tokenizer, source_of(memory).documents, question, answer, citations)


def source_of(memory: Memory) -> Source:
    """The documents of a memory that `compress` made, and where its tokens lie in them.

    Raises:
        MemoryFileError: it does not know them, or not as longfit writes them.
    """
    if memory.source is None:
        raise MemoryFileError("this memory does not know its documents; make it with longfit.docqa.compress")
    return Source.from_dict(memory.source)


def _documents(given: str | Document | Sequence[Document]) -> Sequence[Document]:
    if isinstance(given, str):
        return [Document("document", given.strip())]
    return [given] if isinstance(given, Document) else given


def _cited(model: Any, tokenizer: Any, documents: Sequence[Document], question: str, answer: Answer, n: int) -> Answer:
    if not n:
        return answer
    found = cite(model, tokenizer, documents, question, answer.text, n=n)
    return dataclasses.replace(answer, citations=tuple(found))


def _answer(
    model: Any,
    tokenizer: Any,
    context: list[int],
    question: list[int],
    max_new_tokens: int,
    memory: Memory | None = None,
) -> Answer:
    """The greedy answer to a question after a context, or after a memory of one."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}; it has to be at least 1")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad}
    how |= {"question_tokens": len(question)} if memory is None else {"memory": memory}
    prompt = _tensor(model, context + question)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
    text = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    return Answer(text, model.fit_report, len(question))


def _tensor(model: Any, ids: list[int]) -> Tensor:
    return torch.tensor([ids], dtype=torch.long, device=model.device)

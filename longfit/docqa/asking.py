"""A question to documents, or to a memory of them, through a wrapped model."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longfit.cache import FitCache
from longfit.docqa.citations import Citation, cite
from longfit.docqa.document import Document
from longfit.docqa.kept import Kept, kept, no_text, spans_of
from longfit.docqa.prompt import context_of, question_ids
from longfit.docqa.source import Source
from longfit.docqa.tokens import tokenizer_hash
from longfit.errors import FingerprintError, InputError, MemoryFileError
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
        InputError: an empty document or question, a question longer than what the budget keeps, or a chat template
            that hides the question.
        BudgetError: the budget cannot be met for these documents.
    """
    asked = question_ids(tokenizer, question)
    if not aware:
        memory = compress(model, tokenizer, documents)
        return ask_memory(model, tokenizer, memory, question, max_new_tokens=max_new_tokens, citations=citations)
    context, source = context_of(tokenizer, as_documents(documents))
    answer, cache = _answer(model, tokenizer, context, asked, max_new_tokens)
    if not citations:
        return answer
    return cited(model, tokenizer, source, question, answer, citations, kept_of(cache, source))


def compress(model: Any, tokenizer: Any, documents: str | Document | Sequence[Document]) -> Memory:
    """Read documents into a memory, without a question; it remembers them.

    Raises:
        InputError: an empty document.
        BudgetError: the budget cannot be met for these documents.
    """
    context, source = context_of(tokenizer, as_documents(documents))
    memory = model.compress(_tensor(model, context))
    return _remembering(memory, source, tokenizer)


def append(model: Any, tokenizer: Any, memory: Memory, documents: str | Document | Sequence[Document]) -> Memory:
    """Read more documents after those of a memory, within the same budget; the memory itself does not change.

    Raises:
        InputError: an empty document.
        FingerprintError: the memory belongs to another model, tokenizer or method.
        MemoryFileError: a memory that does not know its documents.
        UnsupportedFeatureError: what `Memory.append` refuses.
    """
    check_tokenizer(memory, tokenizer)
    before = source_of(memory)
    context, source = context_of(tokenizer, as_documents(documents), first=False)
    return _remembering(memory.append(model, _tensor(model, context)), before.added(source), tokenizer)


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
        InputError: an empty question, or one longer than what the budget keeps.
        FingerprintError: the memory belongs to another model, tokenizer or method.
        MemoryFileError: citations of a memory that does not know its documents.
    """
    check_tokenizer(memory, tokenizer)
    asked = question_ids(tokenizer, question)
    source = source_of(memory) if citations else None
    answer, _ = _answer(model, tokenizer, [], asked, max_new_tokens, memory)
    if source is None:
        return answer
    return cited(model, tokenizer, source, question, answer, citations, kept_of(memory.cache, source))


def source_of(memory: Memory) -> Source:
    """The documents of a memory that `compress` made, and where its tokens lie in them.

    Raises:
        MemoryFileError: it does not know them, or not as longfit writes them.
    """
    if memory.source is None:
        raise MemoryFileError("this memory does not know its documents; make it with longfit.docqa.compress")
    return Source.from_dict(memory.source)


def kept_of(cache: FitCache, source: Source) -> Kept | None:
    """What a cache kept of each token of a context; None where the tokenizer does not say where they are."""
    if not source.token_starts:
        return None
    after = cache.tokens_in - len(source.token_starts)
    return kept(Memory(cache, cache.tokens_in, {}), np.concatenate([spans_of(source), no_text(after)]))


def cited(
    model: Any, tokenizer: Any, source: Source, question: str, answer: Answer, n: int, kept: Kept | None
) -> Answer:
    """The answer with up to `n` citations."""
    found = cite(model, tokenizer, source.documents, question, answer.text, n=n, kept=kept)
    return dataclasses.replace(answer, citations=tuple(found))


def check_tokenizer(memory: Memory, tokenizer: Any) -> None:
    """
    Raises:
        FingerprintError: the memory was made with another tokenizer or chat template.
    """
    made_by = None if memory.source is None else memory.source.get("tokenizer")
    if made_by is not None and made_by != tokenizer_hash(tokenizer):
        raise FingerprintError(
            "this memory belongs to another tokenizer or chat template; load the model's own, or compress the "
            "documents again"
        )


def as_documents(given: str | Document | Sequence[Document]) -> Sequence[Document]:
    """Text, one document or several, as several."""
    if isinstance(given, str):
        return [Document("document", given.strip())]
    return [given] if isinstance(given, Document) else given


def _remembering(memory: Memory, source: Source, tokenizer: Any) -> Memory:
    return dataclasses.replace(memory, source={**source.to_dict(), "tokenizer": tokenizer_hash(tokenizer)})


def _answer(
    model: Any,
    tokenizer: Any,
    context: list[int],
    question: list[int],
    max_new_tokens: int,
    memory: Memory | None = None,
) -> tuple[Answer, FitCache]:
    """The greedy answer to a question after a context, or after a memory of one, and the cache as it then is."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}; it has to be at least 1")
    _check_length(model, len(question), len(context), memory, max_new_tokens)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad}
    how |= {"question_tokens": len(question)} if memory is None else {"memory": memory}
    prompt = _tensor(model, context + question)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), return_dict_in_generate=True, **how)
    text = tokenizer.decode(out.sequences[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    return Answer(text, model.fit_report, len(question)), out.past_key_values


def _check_length(model: Any, question: int, context: int, memory: Memory | None, new_tokens: int) -> None:
    """
    Raises:
        InputError: the budget keeps fewer tokens than the question has, which would lose a part of it.
    """
    if memory is None:
        ledger = model.longfit.new_cache(model.get_decoder(), 1, context + question, new_tokens).ledger
    else:
        ledger, context = memory.cache.ledger, memory.tokens_in
    keeps = ledger.kept_limit(context + question)
    if question > keeps:
        raise InputError(
            f"the question has {question:,} tokens, and the budget keeps {keeps:,} of question and document together; "
            "ask in fewer words, or raise the budget"
        )


def _tensor(model: Any, ids: list[int]) -> Tensor:
    return torch.tensor([ids], dtype=torch.long, device=model.device)

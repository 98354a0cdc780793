"""One question to one document, through a wrapped model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longfit.errors import InputError
from longfit.memory import Memory
from longfit.report import FitReport

# Stands for the document while a chat template is applied, to find where its text goes.
MARK = "\u27e6document\u27e7"
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: the answer, special tokens left out.
        report: what was kept and spent.
        question_tokens: tokens of the prompt that come after the document.
    """

    text: str
    report: FitReport
    question_tokens: int


def split_prompt(tokenizer: Any, document: str, question: str) -> tuple[list[int], list[int]]:
    """Token ids of the context and of what follows it; the prompt is exactly the one after the other.

    The chat template is applied where the tokenizer has one: the document and then the question in one turn
    of the user, and the header of the answer. Otherwise the two are plain text, and "Answer:" follows.

    Raises:
        InputError: the document or the question is empty.
    """
    if not document.strip():
        raise InputError("the document is empty; there is nothing to ask about")
    if not question.strip():
        raise InputError("the question is empty")
    before, after = "", f"{question.strip()}\nAnswer:"
    special = True
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": f"{MARK}{SEPARATOR}{question.strip()}"}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, found, after = text.partition(f"{MARK}{SEPARATOR}")
        if not found:
            raise InputError(
                "this tokenizer's chat template changes the text of the user's turn, so the question cannot be "
                "told from the document"
            )
        special = False
    context = tokenizer(f"{before}{document.strip()}{SEPARATOR}", add_special_tokens=special, verbose=False)
    rest = tokenizer(after, add_special_tokens=False)
    return list(context["input_ids"]), list(rest["input_ids"])


@torch.no_grad()
def ask(
    model: Any,
    tokenizer: Any,
    document: str,
    question: str,
    *,
    aware: bool = True,
    max_new_tokens: int = 64,
) -> Answer:
    """Ask a wrapped model a question about a document, greedily.

    Args:
        model: a model from `longfit.wrap`.
        tokenizer: its tokenizer.
        document, question: text.
        aware: the question is known while the document is read, and question-aware methods look at it. If
            False the document is compressed first, and the question comes to what was kept.
        max_new_tokens: the longest answer.

    Raises:
        InputError: an empty document or question, or a chat template that hides the question.
        BudgetError: the budget cannot be met for this document.
    """
    context, rest = split_prompt(tokenizer, document, question)
    if aware:
        return _answer(model, tokenizer, context, rest, max_new_tokens)
    memory = model.compress(_tensor(model, context))
    return _answer(model, tokenizer, [], rest, max_new_tokens, memory)


def compress(model: Any, tokenizer: Any, document: str) -> Memory:
    """Read a document into a memory, without a question.

    Raises:
        InputError: an empty document.
        BudgetError: the budget cannot be met for this document.
    """
    context, _ = split_prompt(tokenizer, document, "?")
    return model.compress(_tensor(model, context))


@torch.no_grad()
def ask_memory(model: Any, tokenizer: Any, memory: Memory, question: str, *, max_new_tokens: int = 64) -> Answer:
    """Ask a wrapped model a question about what `compress` made of a document, greedily. The memory does not change.

    Raises:
        InputError: an empty question.
        FingerprintError: the memory belongs to another model or method.
    """
    _, rest = split_prompt(tokenizer, "-", question)
    return _answer(model, tokenizer, [], rest, max_new_tokens, memory)


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

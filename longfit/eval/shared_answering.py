"""Answer one sample by every cell of a sweep from one prefill (two where some cells see the question)."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import StoppingCriteriaList

from longfit.cache import FitCache
from longfit.compressors import get
from longfit.eval.answering import Stop, check_kept, record
from longfit.eval.needle import NeedleSample, complete
from longfit.eval.recipe import Cell
from longfit.eval.shared import Recording, recording
from longfit.memory import Memory
from longfit.model import unwrap, wrap


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, sample: NeedleSample, cells: list[Cell], max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Records of ``cells``, none of them a baseline, as ``answering.answer`` makes them.

    ``prefill_seconds`` is the shared prefill's, ``seconds`` a cell's own trimming and answering.
    """
    question = list(sample.question_ids)
    for awareness in ("agnostic", "aware"):
        chosen = [cell for cell in cells if cell.awareness == awareness]
        if not chosen:
            continue
        aware = awareness == "aware"
        ids = torch.tensor([list(sample.context_ids) + question * aware], device=model.device)
        methods = [get(cell.method, **cell.options) for cell in chosen]
        started = time.perf_counter()
        with recording(model, ids, methods, len(question) * aware) as recorded:
            prefill = time.perf_counter() - started
            for cell in chosen:
                yield _answer(model, tokenizer, sample, cell, recorded, ids, max_new_tokens) | {
                    "prefill_seconds": round(prefill, 3)
                }


def _answer(
    model: Any,
    tokenizer: Any,
    sample: NeedleSample,
    cell: Cell,
    recorded: Recording,
    ids: torch.Tensor,
    max_new_tokens: int,
) -> dict[str, Any]:
    method = get(cell.method, **cell.options)
    wrapped = wrap(model, method, budget=cell.budget, chunk_tokens=ids.shape[1])
    stop = Stop(tokenizer, max_new_tokens)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    how: dict[str, Any] = {
        "do_sample": False,
        "pad_token_id": pad,
        "stopping_criteria": StoppingCriteriaList([stop]),
    }
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        cache = recorded.trimmed(method, cell.keep_ratio)
        kept = {"tokens_in": cache.seen, "kept_tokens": cache.kept_tokens, "kv_bytes": cache.nbytes}
        if cell.awareness == "aware":
            text = _continue(wrapped, tokenizer, recorded, cache, ids, max_new_tokens, how)
        else:
            memory = Memory(cache, cache.seen, wrapped._fingerprint())
            asked = torch.tensor([list(sample.question_ids)], device=model.device)
            out = wrapped.generate(asked, memory=memory, max_new_tokens=max_new_tokens, **how)
            text = tokenizer.decode(out[0, asked.shape[1] :], skip_special_tokens=True)
    finally:
        unwrap(model)
    check_kept(cell, cache.kept_tokens, cache.seen, max_new_tokens)
    spent = {
        "seconds": round(time.perf_counter() - wall, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
    }
    details = {"repr": repr(method), "chunks": 1, "chunk_tokens": ids.shape[1], "shared_prefill": True}
    return record(sample, cell, text) | kept | spent | details


def _continue(
    wrapped: Any,
    tokenizer: Any,
    recorded: Recording,
    cache: FitCache,
    ids: torch.Tensor,
    max_new_tokens: int,
    how: dict[str, Any],
) -> str:
    """The answer after a prompt whose last logits are known: its first token comes from them."""
    first = recorded.logits[:, -1].argmax(-1, keepdim=True)
    out = torch.cat([ids, first], 1)
    eos = wrapped.generation_config.eos_token_id
    ended = int(first) in (eos if isinstance(eos, list) else [eos])
    if not ended and not complete(tokenizer.decode(first[0])):
        out = wrapped.generate(out, past_key_values=cache, max_new_tokens=max_new_tokens - 1, **how)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

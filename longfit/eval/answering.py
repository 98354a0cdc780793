"""How one cell of a sweep answers one needle sample, and what it measures while it does."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from longfit.errors import BudgetExceededError, ScoreError
from longfit.eval import needle
from longfit.eval.needle import NeedleSample
from longfit.eval.recipe import Cell
from longfit.eval.tables import BASELINES


@contextmanager
def wrapped(model: Any, cell: Cell, chunk_tokens: int | None) -> Iterator[Any]:
    """The model as ``cell`` wants it: plain for a baseline, else wrapped, and unwrapped whatever happens."""
    if cell.method in BASELINES:
        yield model
        return
    from longfit.compressors import get
    from longfit.model import unwrap, wrap

    compressor = get(cell.method, **cell.options)
    fitted = wrap(model, compressor, budget=cell.budget, chunk_tokens=chunk_tokens)
    try:
        yield fitted
    finally:
        unwrap(fitted)


class Stop(StoppingCriteria):
    """Ends an answer at its first whole value, and notes when the first token was there."""

    def __init__(self, tokenizer: Any, max_new_tokens: int) -> None:
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self.first_token_at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.first_token_at = self.first_token_at or time.perf_counter()
        # The question holds no digits, so the last tokens are enough, however generate was given the prompt.
        tails = self.tokenizer.batch_decode(input_ids[:, -self.max_new_tokens :])
        return torch.tensor([needle.complete(tail) for tail in tails], device=input_ids.device)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, sample: NeedleSample, cell: Cell, max_new_tokens: int) -> dict[str, Any]:
    """Ask ``model`` one sample the way ``cell`` says; the record is one line of ``samples.jsonl``.

    Raises ScoreError where nothing was dropped although ``keep_ratio`` is below 1, and BudgetExceededError
    where more was kept than the cell allows.
    """
    stop = Stop(tokenizer, max_new_tokens)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad}
    how["stopping_criteria"] = StoppingCriteriaList([stop])
    context, question = list(sample.context_ids), list(sample.question_ids)
    details: dict[str, Any] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    if cell.method in BASELINES:
        prompt = _baseline_context(cell, sample) + question
        given = _tensor(model, prompt)
        out = model.generate(given, attention_mask=torch.ones_like(given), **how)
        kept = float(len(prompt))
        prefill = (stop.first_token_at or time.perf_counter()) - wall
        kv_bytes, tokens_in = _kv_bytes(model, len(prompt)), len(prompt)
    elif cell.awareness == "aware":
        prompt = context + question
        given = _tensor(model, prompt)
        how["question_tokens"] = len(question)
        out = model.generate(given, attention_mask=torch.ones_like(given), **how)
        kept, kv_bytes, prefill, tokens_in, details = _measured(model)
    else:
        memory = model.compress(_tensor(model, context))
        kept, kv_bytes, prefill, tokens_in, details = _measured(model)
        prompt = question
        out = model.generate(_tensor(model, question), memory=memory, **how)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    text = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    if cell.method not in BASELINES:
        check_kept(cell, kept, tokens_in, max_new_tokens)
    spent = {
        "prefill_seconds": round(prefill, 3),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
    }
    held = {"tokens_in": tokens_in, "kept_tokens": kept, "kv_bytes": kv_bytes}
    return record(sample, cell, text) | held | spent | details


def record(sample: NeedleSample, cell: Cell, text: str) -> dict[str, Any]:
    """What every line of ``samples.jsonl`` says, before what was kept and spent."""
    return {
        "cell": cell.cell_id,
        "sample": sample.sample_id,
        "method": cell.method,
        "options": cell.options,
        "keep_ratio": cell.keep_ratio,
        "awareness": cell.awareness,
        "task": sample.task,
        "index": sample.index,
        "depth": sample.depth,
        "correct": needle.score(text, sample.answers),
        "answer": text,
        "expected": list(sample.answers),
        "context_tokens": len(sample.context_ids),
        "question_tokens": len(sample.question_ids),
        "sha256": sample.sha256,
    }


def _baseline_context(cell: Cell, sample: NeedleSample) -> list[int]:
    """The whole context, its two ends (LongBench's middle truncation, equal in size), or no haystack."""
    context = list(sample.context_ids)
    if cell.method == "full":
        return context
    if cell.method == "no_context":
        start, stop = sample.haystack_tokens
        return context[:start] + context[stop:]
    kept_tokens = int(cell.keep_ratio * len(context))
    head = kept_tokens // 2
    return context[:head] + context[len(context) - (kept_tokens - head) :]


def _tensor(model: Any, ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids], dtype=torch.long, device=model.device)


def _kv_bytes(model: Any, tokens: int) -> int:
    """Bytes that a full cache of ``tokens`` tokens holds."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * tokens * model.dtype.itemsize


def _measured(model: Any) -> tuple[float, int, float, int, dict[str, Any]]:
    """Kept tokens, bytes, prefill seconds, tokens in and further details of the wrapped model's last call."""
    report = model.fit_report
    details = {"repr": report.method, "chunks": report.chunks, "chunk_tokens": report.chunk_tokens}
    return report.kept_tokens, report.kv_bytes, report.prefill_seconds, report.tokens_in, details


def check_kept(cell: Cell, kept_tokens: float, tokens_in: int, new_tokens: int) -> None:
    """A cell that dropped nothing, or too little, would show full-cache quality under a method's name."""
    if cell.keep_ratio < 1 and kept_tokens >= tokens_in:
        kept = f"{kept_tokens:g} of {tokens_in} tokens"
        raise ScoreError(f"{cell.cell_id} kept {kept}: nothing was compressed at {cell.budget}")
    if kept_tokens > cell.keep_ratio * tokens_in + new_tokens:
        raise BudgetExceededError(f"{cell.cell_id} kept {kept_tokens:g} of {tokens_in} tokens, above {cell.budget}")

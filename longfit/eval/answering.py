"""How one cell answers one sample, and what it measures while it does."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from longfit.compressors import get
from longfit.errors import UnsupportedFeatureError
from longfit.eval.cells import OWN, Cell
from longfit.eval.measures import Held, Outcome, check_kept, kept_map
from longfit.eval.sample import Sample
from longfit.eval.task import Task
from longfit.families import model_shape
from longfit.meter import PeakMeter
from longfit.model import unwrap, wrap
from longfit.units import MemoryBudget

TARGET_CHUNK = 1024  # target tokens that a bounded cache reads at once


@dataclass(frozen=True)
class Reader:
    """The model and what is asked of it; `max_new_tokens` stands in for the samples' own where it is given."""

    model: Any
    tokenizer: Any
    max_new_tokens: int | None = None

    def limit(self, sample: Sample) -> int:
        return self.max_new_tokens or sample.max_new_tokens

    def tensor(self, ids: tuple[int, ...]) -> Tensor:
        """[1, T] on the model's device."""
        return torch.tensor([ids], dtype=torch.long, device=self.model.device)

    def full_kv_bytes(self, tokens: int) -> int:
        """Bytes of a plain cache of `tokens` tokens."""
        return model_shape(self.model).full_kv_bytes(tokens)


@contextmanager
def wrapped(model: Any, cell: Cell, chunk_tokens: int | None = None, tokenizer: Any = None) -> Iterator[Any]:
    """The model as ``cell`` wants it: plain for a baseline, else wrapped, and unwrapped whatever happens."""
    if cell.baseline:
        yield model
        return
    chunk = chunk_tokens or cell.chunk_tokens
    if cell.attends_alone:
        fitted = wrap(model, attention=cell.patch, chunk_tokens=chunk)
    else:
        compressor = get(cell.method, **cell.options)
        budget = None if cell.budget == OWN else cell.budget
        fitted = wrap(model, compressor, budget=budget, chunk_tokens=chunk, attention=cell.patch, tokenizer=tokenizer)
    try:
        yield fitted
    finally:
        unwrap(fitted)


class Stop(StoppingCriteria):
    """Ends an answer where no further token can change its score, and notes when the first token was there."""

    def __init__(self, tokenizer: Any, prompt_tokens: int, settled: Callable[[str], bool]) -> None:
        self.tokenizer, self.prompt_tokens, self.settled = tokenizer, prompt_tokens, settled
        self.first_token_at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.first_token_at = self.first_token_at or time.perf_counter()
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_tokens :], skip_special_tokens=True)
        return torch.tensor([self.settled(text) for text in texts], device=input_ids.device)


@torch.no_grad()
def answer(reader: Reader, task: Task, sample: Sample, cell: Cell) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Ask the model, already wrapped as ``cell`` wants it, one sample.

    Returns:
        The line for ``samples.jsonl``, and the map of what was kept, where there is a memory to look into.

    Raises:
        ScoreError, BudgetExceededError: see `check_kept`.
        UnsupportedFeatureError: an aware cell on a task that asks no question.
    """
    check_question(sample, cell)
    meter, kept = PeakMeter(reader.model.device), None
    if cell.baseline:
        outcome, held = _plain(reader, task, sample, cell)
    elif cell.awareness == "aware":
        prompt = reader.tensor(sample.prompt_ids)
        outcome = generate(reader, task, sample, prompt, question_tokens=len(sample.question_ids))
        held = replace(held_by(reader.model), tokens_in=len(sample.prompt_ids))
    else:
        started = time.perf_counter()
        memory = reader.model.compress(reader.tensor(sample.context_ids))
        held = held_by(reader.model)
        compressing = time.perf_counter() - started
        if sample.target_ids:
            outcome = likelihood(reader, sample, memory.fork(reader.model._fingerprint()))
        else:
            outcome = generate(reader, task, sample, reader.tensor(sample.question_ids), memory=memory)
        outcome.prefill_seconds += compressing
        kept = kept_record(sample, cell, memory.cache)
    peak, read = meter.peak_bytes(), None
    if not cell.baseline:
        check_kept(cell, held, reader.limit(sample))
        read = read_per_token(reader.model.fit_report.read_bytes, outcome)
    measured = held.record() | {"peak_bytes": peak, "shared_prefill": False, "read_bytes_per_token": read}
    return record(task, sample, cell, outcome) | measured, kept


def read_per_token(read_bytes: int, outcome: Outcome) -> int | None:
    """Bytes that the full-attention layers read of the cache for each decoded token after the first."""
    return read_bytes // (outcome.new_tokens - 1) if outcome.new_tokens > 1 else None


def check_question(sample: Sample, cell: Cell) -> None:
    """Likelihoods follow a text and ask nothing.

    Raises:
        UnsupportedFeatureError: an aware cell.
    """
    if sample.target_ids and cell.awareness == "aware":
        raise UnsupportedFeatureError(f"{sample.task} asks no question to be aware of; use awareness: [agnostic]")


def _plain(reader: Reader, task: Task, sample: Sample, cell: Cell) -> tuple[Outcome, Held]:
    """The plain model, on the whole prompt or what a baseline leaves of it."""
    context = baseline_context(reader, cell, sample)
    tokens = len(context) + len(sample.question_ids)
    if sample.target_ids:
        outcome = likelihood(reader, sample, None, context)
    else:
        outcome = generate(reader, task, sample, reader.tensor(context + sample.question_ids))
    size = reader.full_kv_bytes(tokens)
    return outcome, Held(tokens, float(tokens), size, size)


def generate(reader: Reader, task: Task, sample: Sample, prompt: Tensor, **how: Any) -> Outcome:
    """The greedy answer to ``prompt`` [1, T]."""
    tokenizer, start = reader.tokenizer, prompt.shape[1]
    stop = Stop(tokenizer, start, lambda text: task.settled(text, sample))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    how = {"max_new_tokens": reader.limit(sample), "attention_mask": torch.ones_like(prompt)} | how
    started = time.perf_counter()
    out = reader.model.generate(
        prompt, do_sample=False, pad_token_id=pad, stopping_criteria=StoppingCriteriaList([stop]), **how
    )
    ended = time.perf_counter()
    first = stop.first_token_at or ended
    new = out[0, start:]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Outcome(text, [], first - started, ended - first, len(new))


def likelihood(reader: Reader, sample: Sample, cache: Any, context: tuple[int, ...] = ()) -> Outcome:
    """Negative log-likelihood of the sample's target tokens after the cache, or after ``context``, and the question."""
    targets, started = reader.tensor(sample.target_ids), time.perf_counter()
    scores = target_log_probs(reader.model, reader.tensor(context + sample.question_ids), targets, cache)
    nll = -scores.gather(-1, targets[0, :, None])[:, 0]
    return Outcome("", nll.tolist(), time.perf_counter() - started)


def target_log_probs(model: Any, prompt: Tensor, targets: Tensor, cache: Any) -> Tensor:
    """Log-probabilities [N, V] in nats of what may stand at each of the N target tokens.

    The prompt is read before the targets, so that a bounded cache is trimmed in between, as it is before an answer.

    Args:
        prompt: [1, T] tokens after the cache; targets: [1, N] tokens after the prompt.
        cache: a bounded cache to continue, or None for the plain model.
    """
    n = targets.shape[1]
    if cache is None:
        logits = model(torch.cat([prompt, targets[:, :-1]], 1), use_cache=False, logits_to_keep=n).logits[0]
    else:
        first = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0]
        step = 1 if decodes_apart(cache) else TARGET_CHUNK
        later = [
            model(targets[:, at : min(at + step, n - 1)], past_key_values=cache, use_cache=True).logits[0]
            for at in range(0, n - 1, step)
        ]
        logits = torch.cat([first, *later])
    return logits.float().log_softmax(-1)


def decodes_apart(cache: Any) -> bool:
    """Whether the cache's attention is to be measured token by token, since a chunk would show another one."""
    return cache.patch is not None and not cache.patch.alike_in_chunks


def record(task: Task, sample: Sample, cell: Cell, outcome: Outcome) -> dict[str, Any]:
    """What every line of ``samples.jsonl`` says, before what was kept."""
    nll = outcome.nll
    score = sum(nll) / len(nll) if nll else task.score(outcome.text, sample)
    return {
        "cell": cell.cell_id,
        "sample": sample.sample_id,
        "suite": sample.suite,
        "task": sample.task,
        "index": sample.index,
        "method": cell.method,
        "options": cell.options,
        "budget": cell.budget,
        "keep_ratio": cell.keep_ratio,
        "attention": cell.attention_label,
        "awareness": cell.awareness,
        "chunk_tokens": cell.chunk_tokens,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "score": round(score, 6),
        "answer": outcome.text,
        "expected": list(sample.answers),
        "context_tokens": len(sample.context_ids),
        "question_tokens": len(sample.question_ids),
        "prefill_seconds": round(outcome.prefill_seconds, 3),
        "decode_seconds": round(outcome.decode_seconds, 3),
        "new_tokens": outcome.new_tokens,
        "details": shown_details(sample),
        "nll_by_position": _eighths(nll) if nll else None,
        "sha256": sample.sha256,
    }


def kept_record(sample: Sample, cell: Cell, cache: Any) -> dict[str, Any]:
    """The map of what was kept, for ``kept.jsonl``."""
    tokens = len(sample.context_ids)
    found = {"cell": cell.cell_id, "sample": sample.sample_id, "task": sample.task, "tokens": tokens}
    return found | {"layers": kept_map(cache, tokens)}


def shown_details(sample: Sample) -> dict[str, Any]:
    """The sample's details that are worth a line in a result: not its references again."""
    return {key: value for key, value in sample.details.items() if isinstance(value, bool | int | float | str)}


def _eighths(nll: list[float]) -> list[float]:
    """Means of eight equal stretches, in order."""
    edges = [round(i * len(nll) / 8) for i in range(9)]
    return [round(sum(nll[a:b]) / (b - a), 4) for a, b in pairwise(edges) if b > a]


def baseline_context(reader: Reader, cell: Cell, sample: Sample) -> tuple[int, ...]:
    """The whole context, its two ends (LongBench's middle truncation, equal in size), or none of its content."""
    context = sample.context_ids
    if cell.method == "full":
        return context
    if cell.method == "no_context":
        return sample.prompt.empty_ids
    kept_tokens = min(len(context), truncated_tokens(reader, cell, len(context)))
    head = kept_tokens // 2
    return context[:head] + context[len(context) - (kept_tokens - head) :]


def truncated_tokens(reader: Reader, cell: Cell, tokens: int) -> int:
    """Tokens of a context of ``tokens`` that are as many as a method would keep at the cell's budget."""
    if cell.keep_ratio is not None:
        return int(cell.keep_ratio * tokens)
    found = MemoryBudget.parse(cell.budget)
    if found.kept_tokens is not None:
        return found.kept_tokens
    low, high = 0, tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if reader.full_kv_bytes(middle) <= (found.budget_bytes or 0) else (low, middle - 1)
    return low


def held_by(model: Any) -> Held:
    """What the wrapped model's last call held."""
    report = model.fit_report
    return Held(report.tokens_in, report.kept_tokens, report.kv_bytes, report.full_kv_bytes, report.limit_tokens)

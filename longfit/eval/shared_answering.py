"""Answer one sample by every cell of a sweep from one prefill (two where some cells see the question)."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from longfit.cache import FitCache
from longfit.compressors import get
from longfit.eval.answering import Reader, generate, kept_record, likelihood, record
from longfit.eval.cells import Cell
from longfit.eval.measures import Held, Outcome, check_kept
from longfit.eval.sample import Sample
from longfit.eval.shared import Recording, recording
from longfit.eval.task import Task
from longfit.memory import Memory
from longfit.model import unwrap, wrap


@torch.no_grad()
def answers(
    reader: Reader, task: Task, sample: Sample, cells: list[Cell], failed: Callable[[Cell, Exception], None]
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """What ``answering.answer`` gives, for each of ``cells``, none of them a baseline.

    ``prefill_seconds`` is the shared prefill's and ``peak_bytes`` unknown: costs are measured apart. A cell that raises
    is handed to ``failed``, and the others go on.
    """
    for awareness in ("agnostic", "aware"):
        chosen = [cell for cell in cells if cell.awareness == awareness]
        if not chosen:
            continue
        aware = awareness == "aware"
        question = len(sample.question_ids) * aware
        ids = reader.tensor(sample.prompt_ids if aware else sample.context_ids)
        methods = [get(cell.method, **cell.options) for cell in chosen]
        started = time.perf_counter()
        with recording(reader.model, ids, methods, question) as recorded:
            prefill = round(time.perf_counter() - started, 3)
            for cell in chosen:
                try:
                    line, kept = _answer(reader, task, sample, cell, recorded, ids)
                except Exception as error:
                    failed(cell, error)
                    continue
                yield line | {"prefill_seconds": prefill}, kept


def _answer(
    reader: Reader, task: Task, sample: Sample, cell: Cell, recorded: Recording, ids: Tensor
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    method, kept = get(cell.method, **cell.options), None
    assert cell.keep_ratio is not None
    fitted = wrap(reader.model, method, budget=cell.budget, chunk_tokens=ids.shape[1])
    try:
        cache = recorded.trimmed(method, cell.keep_ratio)
        tokens = ids.shape[1]
        held = Held(tokens, cache.kept_tokens, cache.nbytes, reader.full_kv_bytes(tokens))
        check_kept(cell, held, reader.limit(sample))
        if cell.awareness == "agnostic":
            kept = kept_record(sample, cell, cache)
        if sample.target_ids:
            outcome = likelihood(reader, sample, cache)
        elif cell.awareness == "aware":
            outcome = _continue(reader, task, sample, recorded, cache, ids)
        else:
            memory = Memory(cache, cache.seen, fitted._fingerprint())
            outcome = generate(reader, task, sample, reader.tensor(sample.question_ids), memory=memory)
    finally:
        unwrap(reader.model)
    measured = held.record() | {"peak_bytes": None, "shared_prefill": True}
    return record(task, sample, cell, outcome) | measured, kept


def _continue(reader: Reader, task: Task, sample: Sample, recorded: Recording, cache: FitCache, ids: Tensor) -> Outcome:
    """The answer after a prompt whose last logits are known: its first token comes from them."""
    first = recorded.logits[:, -1].argmax(-1, keepdim=True)
    opening = reader.tokenizer.decode(first[0], skip_special_tokens=True)
    ends = reader.model.generation_config.eos_token_id
    ended = int(first) in (ends if isinstance(ends, list) else [ends])
    if ended or reader.limit(sample) < 2 or task.settled(opening, sample):
        return Outcome(opening, new_tokens=1)
    return generate(reader, task, sample, torch.cat([ids, first], 1), answered=1, past_key_values=cache)

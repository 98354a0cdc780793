"""Answer one sample by every cell of a sweep from one prefill (two where some cells see the question)."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longfit.cache import FitCache
from longfit.choosing import bind_patch
from longfit.compressors import KeepAll, KVCompressor, get
from longfit.errors import UnsupportedFeatureError
from longfit.eval.answering import (
    Reader,
    check_question,
    decodes_apart,
    kept_record,
    likelihood,
    read_per_token,
    record,
)
from longfit.eval.cells import Cell
from longfit.eval.measures import Held, Outcome, check_kept
from longfit.eval.sample import Sample
from longfit.eval.shared import Recording, recording
from longfit.eval.task import Task
from longfit.eval.together import generate_together, likelihoods_together
from longfit.model import unwrap, wrap


@torch.no_grad()
def answers(
    reader: Reader, task: Task, sample: Sample, cells: list[Cell], failed: Callable[[Cell, Exception], None]
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """What ``answering.answer`` gives, for each of ``cells``, none of them a baseline or with a prefill of its own.

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
        methods = [KeepAll() if cell.attends_alone else get(cell.method, **cell.options) for cell in chosen]
        started = time.perf_counter()
        with recording(reader.model, ids, methods, question) as recorded:
            prefill = {"prefill_seconds": round(time.perf_counter() - started, 3)}
            ready = []
            for cell, method in zip(chosen, methods, strict=True):
                try:
                    ready.append(_trim(reader, sample, cell, method, recorded, ids.shape[1]))
                except Exception as error:
                    failed(cell, error)
            for trimmed, outcome in zip(ready, _outcomes(reader, task, sample, ready, recorded, ids), strict=True):
                read = read_per_token(trimmed.cache.read_bytes, outcome)
                measured = trimmed.held.record() | {
                    "peak_bytes": None,
                    "shared_prefill": True,
                    "read_bytes_per_token": read,
                }
                yield record(task, sample, trimmed.cell, outcome) | measured | prefill, trimmed.kept


@dataclass
class Trimmed:
    """What one cell has left of the shared prefill."""

    cell: Cell
    cache: FitCache
    held: Held
    kept: dict[str, Any] | None


def _trim(
    reader: Reader, sample: Sample, cell: Cell, method: KVCompressor, recorded: Recording, tokens: int
) -> Trimmed:
    check_question(sample, cell)
    ratio = 1.0 if cell.attends_alone else cell.keep_ratio
    if ratio is None:
        raise UnsupportedFeatureError(f"{cell.cell_id}: a shared prefill is trimmed to ratios; use keep_ratios")
    method.bind(reader.model)
    patch = cell.patch
    if patch is not None:
        bind_patch(patch, reader.model)
    cache = recorded.trimmed(method, ratio, patch)
    held = Held(tokens, cache.kept_tokens, cache.nbytes, reader.full_kv_bytes(tokens))
    check_kept(cell, held, reader.limit(sample))
    kept = kept_record(sample, cell, cache) if cell.awareness == "agnostic" else None
    return Trimmed(cell, cache, held, kept)


def _outcomes(
    reader: Reader, task: Task, sample: Sample, ready: list[Trimmed], recorded: Recording, ids: Tensor
) -> Iterator[Outcome]:
    """The answer of each cell, in order."""
    if not ready:
        return
    aware = ready[0].cell.awareness == "aware"
    # Any method will do to wrap with: the caches bring their own.
    fitted = wrap(reader.model, "knorm", budget="100%")
    try:
        if sample.target_ids:
            apart = [trimmed.cache for trimmed in ready if decodes_apart(trimmed.cache)]
            stepped = iter(likelihoods_together(reader, sample, apart))
            for trimmed in ready:
                alone = not decodes_apart(trimmed.cache)
                yield likelihood(reader, sample, trimmed.cache) if alone else next(stepped)
            return
        caches = [trimmed.cache for trimmed in ready]
        if aware:
            yield from _continued(reader, task, sample, caches, recorded)
        else:
            yield from generate_together(reader, task, sample, caches, reader.tensor(sample.question_ids))
    finally:
        unwrap(fitted)


def _continued(
    reader: Reader, task: Task, sample: Sample, caches: list[FitCache], recorded: Recording
) -> list[Outcome]:
    """The answers after a prompt whose last logits are known: their first token comes from them."""
    first = int(recorded.logits[0, -1].argmax())
    opening = reader.tokenizer.decode([first], skip_special_tokens=True)
    ends = reader.model.generation_config.eos_token_id
    ended = first in (ends if isinstance(ends, list) else [ends])
    if ended or reader.limit(sample) < 2 or task.settled(opening, sample):
        return [Outcome(opening, new_tokens=1) for _ in caches]
    return generate_together(reader, task, sample, caches, reader.tensor((first,)), first)

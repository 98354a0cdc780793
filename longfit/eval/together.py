"""Answers and likelihoods of several caches at once: rows of one batch, each with its own method and budget."""

import torch
from torch import Tensor

from longfit.cache import FitCache
from longfit.cache.side_by_side import SideBySide
from longfit.eval.answering import Reader
from longfit.eval.measures import Outcome
from longfit.eval.sample import Sample
from longfit.eval.task import Task
from longfit.fitted import base_forward

ROWS = 64


@torch.no_grad()
def generate_together(
    reader: Reader, task: Task, sample: Sample, caches: list[FitCache], prompt: Tensor, first: int | None = None
) -> list[Outcome]:
    """The greedy answer of each cache to ``prompt`` [1, T], as `answering.generate` gives it alone.

    The model has to be wrapped (any method: the caches bring their own). What differs from alone is the shape of the
    matrix products, so in half precision a near tie may fall the other way.

    Args:
        first: the answers' first token where it is known; the prompt is then that token.
    """
    outcomes: list[Outcome] = []
    for start in range(0, len(caches), ROWS):
        outcomes += _batch(reader, task, sample, caches[start : start + ROWS], prompt, first)
    return outcomes


def _batch(
    reader: Reader, task: Task, sample: Sample, caches: list[FitCache], prompt: Tensor, first: int | None
) -> list[Outcome]:
    ends = reader.model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    answers: list[list[int]] = [[] if first is None else [first] for _ in caches]
    texts = ["" for _ in caches]
    live, given = list(range(len(caches))), prompt.expand(len(caches), -1)
    while live:
        chosen = _forward(reader, [caches[row] for row in live], given).argmax(-1).tolist()
        going, tokens = [], []
        for row, token in zip(live, chosen, strict=True):
            answers[row].append(token)
            texts[row] = reader.tokenizer.decode(answers[row], skip_special_tokens=True)
            full = len(answers[row]) >= reader.limit(sample)
            if not (full or token in stops or task.settled(texts[row], sample)):
                going.append(row)
                tokens.append([token])
        live, given = going, torch.tensor(tokens, device=prompt.device)
    return [Outcome(text, new_tokens=len(answer)) for text, answer in zip(texts, answers, strict=True)]


@torch.no_grad()
def likelihoods_together(reader: Reader, sample: Sample, caches: list[FitCache]) -> list[Outcome]:
    """What `answering.likelihood` gives for each cache alone, the targets fed token by token as a decoder feeds them.

    The model has to be wrapped (any method: the caches bring their own).
    """
    outcomes: list[Outcome] = []
    targets = reader.tensor(sample.target_ids)[0]
    for start in range(0, len(caches), ROWS):
        batch, given, nll = caches[start : start + ROWS], reader.tensor(sample.question_ids), []
        for target in targets:
            scores = _forward(reader, batch, given.expand(len(batch), -1)).float().log_softmax(-1)
            nll.append(-scores[:, target])
            given = target.view(1, 1)
        outcomes += [Outcome("", row) for row in torch.stack(nll, 1).tolist()]
    return outcomes


def _forward(reader: Reader, caches: list[FitCache], ids: Tensor) -> Tensor:
    """Logits [B, V] of the last of the tokens ``ids`` [B, T]."""
    beside = SideBySide(caches)
    positions = beside.begin(ids.shape[1]).to(ids.device)
    forward = base_forward(reader.model)
    outputs = forward(input_ids=ids, position_ids=positions, past_key_values=beside, use_cache=True, logits_to_keep=1)
    beside.end()
    return outputs.logits[:, -1]

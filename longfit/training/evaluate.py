"""Is a memory worth its slots? Beside truncation to as many tokens, the whole context, none, and another's memory."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longfit.compressors.soft import LearnedCompressor
from longfit.errors import InputError
from longfit.eval.intervals import mean_interval, paired_difference
from longfit.training.batches import collate, evaluation_episodes
from longfit.training.data import Episode, Source
from longfit.training.data.lookup import Lookup
from longfit.training.losses import log_likelihoods
from longfit.training.student import question_of

CONDITIONS = ("memory", "truncation", "full", "no_context", "shuffled")
# Answers are right or wrong as a whole; plain text has none and only a likelihood.
ACCURACY, NLL = "accuracy", "nll"
Scores = dict[str, dict[str, list[float]]]
Row = dict[str, Any]


def evaluate(
    compressor: LearnedCompressor,
    sources: Sequence[Source],
    *,
    n: int,
    context_tokens: int,
    target_tokens: int = 48,
    ratio: int | None = None,
    batch_size: int = 8,
    window_tokens: int = 0,
    seed: int = 0,
) -> list[Row]:
    """Rows of the table, for every set of the sources; see `evaluate_set`."""
    return [
        row
        for name, source in sets_of(sources).items()
        for row in evaluate_set(
            compressor,
            name,
            source,
            n=n,
            context_tokens=context_tokens,
            target_tokens=target_tokens,
            ratio=ratio,
            batch_size=batch_size,
            window_tokens=window_tokens,
            seed=seed,
        )
    ]


def evaluate_set(
    compressor: LearnedCompressor,
    name: str,
    source: Source,
    *,
    n: int,
    context_tokens: int,
    target_tokens: int = 48,
    ratio: int | None = None,
    batch_size: int = 8,
    window_tokens: int = 0,
    seed: int = 0,
) -> list[Row]:
    """One row for each metric and condition.

    Teacher-forced: an answer is right when each of its tokens is the likeliest one. `nll` is of the answers' tokens, or
    of all tokens where there are no answers, in nats a token. The first token is given in every condition, also where
    a memory could predict it: without a context nothing can, and all conditions have to be measured on the same tokens.
    `mean` has its 95 % interval `low`, `high`; `normalised`
    is (it - no context) / (full - no context), with a bootstrap interval over the samples, and `minus_truncation` the
    paired difference.

    Args:
        compressor: bound. n: samples.

    Raises:
        InputError: n is below 2: a shuffled memory needs another document.
    """
    if n < 2:
        raise InputError(f"an evaluation needs at least 2 samples of each set, not {n}")
    ratio = ratio or compressor.ratio
    episodes = evaluation_episodes(source, n, context_tokens, target_tokens, seed)
    scores, slots, nbytes = measure(compressor, episodes, ratio, batch_size, window_tokens)
    common = {"set": name, "context_tokens": context_tokens, "ratio": ratio, "slots": slots, "memory_bytes": nbytes}
    return [{**common, "n": n, **row} for row in table_rows(scores)]


def sets_of(sources: Sequence[Source]) -> dict[str, Source]:
    """What is evaluated, by name: lookup by the kind of its facts (6 of 8 at most), the rest as trained on."""
    found: dict[str, Source] = {}
    for source in sources:
        if isinstance(source, Lookup):
            for kind in source.kinds:
                own = copy.copy(source)
                own.kinds, own.facts, own.asked = {kind: 1.0}, min(source.facts, 8), min(source.asked, 6)
                found.setdefault(f"lookup/{kind}", own)
        else:
            name = source.kind if source.kind not in found else f"{source.kind}-{len(found)}"
            found[name] = source
    return found


def measure(
    compressor: LearnedCompressor, episodes: Sequence[Episode], ratio: int, batch_size: int, window_tokens: int = 0
) -> tuple[Scores, int, int]:
    """Scores of each sample, by metric and condition; slots of a memory, and its bytes a row."""
    scores: Scores = {NLL: {name: [] for name in CONDITIONS}, ACCURACY: {name: [] for name in CONDITIONS}}
    others = [*episodes[1:], episodes[0]]
    slots = nbytes = 0
    device = compressor.backbone.device
    with torch.no_grad():
        for start in range(0, len(episodes), batch_size):
            batch = collate(episodes[start : start + batch_size], window_tokens=window_tokens).to(device)
            other = collate(others[start : start + batch_size], window_tokens=window_tokens).to(device)
            question = question_of(batch)
            with compressor.asking(question):
                encoded = compressor.compress(batch.context, ratio=ratio)
            slots, nbytes = encoded.slots, encoded.nbytes // encoded.rows
            for name in CONDITIONS:
                if name in ("memory", "shuffled"):
                    with compressor.asking(question):
                        held = encoded if name == "memory" else compressor.compress(other.context, ratio=ratio)
                    logits = compressor.read(held, batch.ids)
                else:
                    kept = {"truncation": slots, "full": batch.context.shape[1], "no_context": 0}[name]
                    logits = base_logits(compressor, batch.context[:, batch.context.shape[1] - kept :], batch.ids)
                nll, right = scored(logits, batch.ids[:, 1:], batch.weights[:, 1:], batch.answers[:, 1:])
                scores[NLL][name] += nll
                scores[ACCURACY][name] += right
    return {metric: found for metric, found in scores.items() if found["full"]}, slots, nbytes


def base_logits(compressor: LearnedCompressor, context: Tensor, ids: Tensor) -> Tensor:
    """Logits [B, T - 1, V] of the base model alone."""
    backbone, n = compressor.backbone, context.shape[1]
    with compressor.lora.using(None):
        positions = torch.arange(n + ids.shape[1], device=ids.device)
        hidden = backbone.run(backbone.embed(torch.cat([context, ids], 1)), positions).hidden
        return backbone.logits(hidden[:, n:-1])


def scored(logits: Tensor, targets: Tensor, weights: Tensor, answers: Tensor) -> tuple[list[float], list[float]]:
    """Of each row the mean NLL of what counts, and the share of its answers that are right (no rows without any)."""
    nll, right = -log_likelihoods(logits, targets), logits.argmax(-1) == targets
    losses, shares = [], []
    for row in range(targets.shape[0]):
        counted = answers[row] if answers[row].any() else weights[row] > 0
        losses.append(float(nll[row][counted].mean()))
        if spans := _spans(answers[row].tolist()):
            shares.append(sum(bool(right[row, start:stop].all()) for start, stop in spans) / len(spans))
    return losses, shares


def _spans(answers: list[bool]) -> list[tuple[int, int]]:
    """Starts and stops of the runs of True."""
    edges = [i for i, (a, b) in enumerate(zip([False, *answers], [*answers, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def table_rows(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Row]:
    """Means, intervals, normalised scores and differences to truncation, from the scores of each sample."""
    rows = []
    for metric in (ACCURACY, NLL):
        if metric not in scores:
            continue
        given = scores[metric]
        for condition in CONDITIONS:
            mean, low, high = mean_interval(list(given[condition]))
            row: Row = {"metric": metric, "condition": condition, "mean": mean, "low": low, "high": high}
            row |= dict(
                zip(("normalised", "normalised_low", "normalised_high"), normalised(given, condition), strict=True)
            )
            if condition == "memory":
                names = ("minus_truncation", "minus_truncation_low", "minus_truncation_high")
                row |= dict(zip(names, paired_difference(given["memory"], given["truncation"]), strict=True))
            rows.append(row)
    return rows


def normalised(
    given: Mapping[str, Sequence[float]], condition: str, draws: int = 2000
) -> tuple[float | None, float | None, float | None]:
    """(it - no context) / (full - no context) and its percentile bootstrap; None where the context makes no gain."""
    own, full, none = (np.asarray(given[name], dtype=float) for name in (condition, "full", "no_context"))
    if abs(full.mean() - none.mean()) < 1e-9:
        return None, None, None
    value = (own.mean() - none.mean()) / (full.mean() - none.mean())
    picks = np.random.default_rng(42).integers(0, own.size, size=(draws, own.size))
    gains = full[picks].mean(1) - none[picks].mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (own[picks].mean(1) - none[picks].mean(1)) / gains
    low, high = np.nanquantile(ratios, [0.025, 0.975])
    return float(value), float(low), float(high)

"""Batches: episodes of one context length side by side, each a pure function of seed, step, micro-batch and process."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longfit.training.data import EVAL, TRAIN, Episode, Source


@dataclass(frozen=True)
class Batch:
    """B episodes.

    Attributes:
        context: [B, n] ids that are compressed.
        ids: [B, T] ids that the reader gets after it, padded on the right.
        weights: [B, T] of `ids` in losses over all tokens; 0 for padding and what is only given.
        answers: [B, T] of `ids`, whether they belong to an answer.
        names: [B] kind and documents of each row.
    """

    context: Tensor
    ids: Tensor
    weights: Tensor
    answers: Tensor
    names: list[str]

    def to(self, device: torch.device) -> "Batch":
        return replace(
            self,
            context=self.context.to(device),
            ids=self.ids.to(device),
            weights=self.weights.to(device),
            answers=self.answers.to(device),
        )


def collate(episodes: Sequence[Episode], pad: int = 0, window_tokens: int = 0) -> Batch:
    """Episodes whose contexts have one length, as a batch.

    Args:
        pad: id that fills up `ids` on the right; it is never predicted, and nothing before it sees it.
        window_tokens: last tokens of each context that the reader gets raw, in front of `ids`.
    """
    cut = len(episodes[0].context) - window_tokens
    T = max(len(episode.ids) for episode in episodes)

    def rows(fill: Any, pick: Any, raw: Any) -> Tensor:
        made = []
        for episode in episodes:
            given = pick(episode)
            made.append([*raw(episode), *given, *[fill] * (T - len(given))])
        return torch.tensor(made)

    def nothing(_: Episode) -> list[float]:
        return [0.0] * window_tokens

    return Batch(
        context=torch.tensor([episode.context[:cut] for episode in episodes]),
        ids=rows(pad, lambda e: e.ids, lambda e: e.context[cut:]),
        weights=rows(0.0, lambda e: e.weights, nothing).float(),
        answers=rows(0.0, lambda e: e.answers, nothing).bool(),
        names=[f"{episode.kind}: {episode.name}" for episode in episodes],
    )


class Batches:
    """Training batches from a mixture of sources.

    Args:
        mixture: sources with their weights.
        batch_size: rows for each process and micro-batch.
        target_tokens: T at most.
        seed: of everything that is drawn.
    """

    def __init__(
        self,
        mixture: Sequence[tuple[float, Source]],
        batch_size: int,
        target_tokens: int,
        seed: int,
        pad: int = 0,
        window_tokens: int = 0,
    ) -> None:
        self.mixture, self.batch_size, self.target_tokens = mixture, batch_size, target_tokens
        self.seed, self.pad, self.window_tokens = seed, pad, window_tokens

    def batch(self, step: int, context_tokens: int, micro: int = 0, process: int = 0) -> Batch:
        """The batch of a step; the same whenever it is asked for."""
        rng = random.Random(f"{self.seed}/{step}/{micro}/{process}")
        weights = [weight for weight, _ in self.mixture]
        chosen = rng.choices([source for _, source in self.mixture], weights, k=self.batch_size)
        made = [source.episode(rng, context_tokens, self.target_tokens, TRAIN, step) for source in chosen]
        return collate(made, self.pad, self.window_tokens)


def evaluation_episodes(
    source: Source, n: int, context_tokens: int, target_tokens: int, seed: int = 0
) -> list[Episode]:
    """`n` episodes of the documents that are never trained on, always the same ones."""
    return [
        source.episode(random.Random(f"eval/{seed}/{index}"), context_tokens, target_tokens, EVAL, 0)
        for index in range(n)
    ]

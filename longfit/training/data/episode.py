"""What is trained and measured on: a context, and what follows it."""

import random
from dataclasses import dataclass
from typing import Protocol

# How much the reader is asked to predict a token: text counts once, an answer four times.
TEXT, ANSWER = 1.0, 4.0
TRAIN, EVAL = "train", "eval"


@dataclass(frozen=True)
class Episode:
    """One context and what the reader then has to predict.

    Attributes:
        context: [n] token ids, exactly as many as were asked for.
        ids: [T] what follows. Its first token is predicted where something stands before it in what the reader reads
            (soft slots, a cue), and given elsewhere; the others are predicted.
        weights: [T] of each token in the losses over all tokens; 0 for what is only given.
        answers: [T] whether a token belongs to an answer; consecutive ones are one answer.
        kind: of the source, as "lookup".
        name: which documents it was made of, for messages.
    """

    context: list[int]
    ids: list[int]
    weights: list[float]
    answers: list[bool]
    kind: str
    name: str


class Source(Protocol):
    """Where episodes come from."""

    kind: str

    def episode(self, rng: random.Random, context_tokens: int, target_tokens: int, split: str, step: int) -> Episode:
        """One episode, the same for the same arguments.

        Args:
            rng: the only source of chance.
            context_tokens: n, exact.
            target_tokens: T at most.
            split: "train" or "eval".
            step: of the training, where a stream stands.
        """
        ...

    def hashes(self, split: str) -> set[str]:
        """SHA-256 of the documents that the split is made of, as far as they are known before training."""
        ...


class Builder:
    """Puts `ids` with their weights together, piece by piece."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.answers: list[bool] = []

    def add(self, ids: list[int], weight: float, answer: bool = False) -> "Builder":
        self.ids += ids
        self.weights += [weight] * len(ids)
        self.answers += [answer] * len(ids)
        return self

    def episode(self, context: list[int], kind: str, name: str) -> Episode:
        return Episode(context, self.ids, self.weights, self.answers, kind, name)

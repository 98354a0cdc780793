"""Sentinel's probe: a logistic regression over what the last token attends to, and what it is trained on."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longfit.compressors.prompt.lm import LanguageModel
from longfit.errors import InputError
from longfit.memory import weights_hash

FOLDER = Path(__file__).with_name("probes")
FORMAT = 1
BEFORE = "Given the following information: "
AFTER = "\nAnswer the following question based on the given information with one or few words: {question}\nAnswer:"


@dataclass(frozen=True)
class Probe:
    """The score of a sentence is `(features - mean) / scale @ weights + bias`, the log-odds that it is needed.

    Attributes:
        layers, heads: L and H of the proxy model; a feature for each head of each layer.
        weights_hash: of the proxy model, as `longfit.memory` has it.
        mean, scale, weights: [L H].
        about: how it was trained and how well it does, as plain JSON values.
    """

    layers: int
    heads: int
    weights_hash: str
    mean: Tensor
    scale: Tensor
    weights: Tensor
    bias: float
    about: dict[str, Any] = field(default_factory=dict)

    def score(self, features: Tensor) -> Tensor:
        """Log-odds [S] of sentences with features [S, L H]."""
        return (features - self.mean) / self.scale @ self.weights + self.bias

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        vectors = {name: [round(v, 6) for v in getattr(self, name).tolist()] for name in ("mean", "scale", "weights")}
        facts = {"format": FORMAT, "layers": self.layers, "heads": self.heads, "weights_hash": self.weights_hash}
        file.write_text(json.dumps({**facts, "bias": round(self.bias, 6), **vectors, "about": self.about}) + "\n")

    @classmethod
    def load(cls, file: Path) -> "Probe":
        """
        Raises:
            InputError: no such file, or no probe in it.
        """
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            if facts["format"] != FORMAT:
                raise ValueError("another format")
            mean, scale, weights = (torch.tensor(facts[k], dtype=torch.float32) for k in ("mean", "scale", "weights"))
            layers, heads = int(facts["layers"]), int(facts["heads"])
            sizes = {tuple(vector.shape) for vector in (mean, scale, weights)}
            if sizes != {(layers * heads,)} or not bool((scale > 0).all()):
                raise ValueError(f"vectors of {sizes} for {layers} layers of {heads} heads")
            about = dict(facts.get("about", {}))
            return cls(layers, heads, str(facts["weights_hash"]), mean, scale, weights, float(facts["bias"]), about)
        except OSError as error:
            raise InputError(f"the probe {file} cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file} is no probe that recipes/prompt/train_sentinel_probe.py wrote: {error}"
            ) from error


@cache
def shipped() -> tuple[Probe, ...]:
    """The probes that come with the package."""
    return tuple(Probe.load(file) for file in sorted(FOLDER.glob("*.json")))


def hash_of(model: Any) -> str:
    """What a probe knows its proxy model by."""
    return weights_hash(model.named_parameters(), skip=[])


def sentence_features(
    lm: LanguageModel, sentences: Sequence[Sequence[int]], questions: Sequence[str]
) -> Iterator[Tensor]:
    """For each question, features [S, L H] of the sentences of one text, given by the proxy's ids.

    What the last token of the prompt attends to among the text's tokens: each head's attention as a share of what it
    gives the text, its mean over a sentence's tokens relative to the mean over the text, and log(1 + that), so that
    long and short texts look alike.
    """
    opening = [*lm.opening, *lm.encode(BEFORE)]
    lengths = torch.tensor([len(sentence) for sentence in sentences])
    text = [*opening, *(token for sentence in sentences for token in sentence)]
    owner = torch.arange(len(sentences)).repeat_interleave(lengths)
    tails = [lm.encode(AFTER.format(question=question.strip())) for question in questions]
    for rows in lm.last_rows(text, tails):
        inside = rows[:, :, len(opening) :].flatten(0, 1)  # [L H, T]
        share = inside / inside.sum(-1, keepdim=True).clamp(min=1e-12)
        sums = torch.zeros(share.shape[0], len(sentences)).index_add_(1, owner, share)
        yield torch.log1p(sums / lengths.clamp(min=1) * inside.shape[1]).T

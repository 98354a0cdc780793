"""How much a few memory vectors hold of a text: decoding capacity, token gain and information gain.

Source: Kuratov et al. 2025, "Cramming 1568 Tokens into a Single Vector", section 3. All figures are teacher-forced and
over tokens 2 to N of a text; the first one is given.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from longfit.compressors.soft.cramming import Cramming
from longfit.compressors.soft.encoded import Encoded

DECODED = 0.99


@dataclass(frozen=True)
class Fit:
    """One text in one memory.

    Attributes:
        tokens: N - 1, how many were to be predicted.
        correct, correct_without: tokens predicted right with the memory, and by the model alone.
        nats, nats_without: cross-entropy, summed over the text.
        steps: of the optimisation (of all texts that were optimised together).
    """

    tokens: int
    correct: int
    correct_without: int
    nats: float
    nats_without: float
    steps: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens


def measure(method: Cramming, ids: Tensor, vectors: int) -> list[Fit]:
    """Optimise `vectors` slots for each row of ids [B, N], N > 1, and compare with the model alone.

    Args:
        method: cramming in either form, bound to a model.
    """
    found = method.crammed(ids, vectors, first=1)
    targets = ids[:, 1:]
    with torch.no_grad():
        logits = method.read(Encoded(0, torch.zeros(0, 2, dtype=torch.long), 0), ids).float()
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)
    correct = (logits.argmax(-1) == targets).sum(1)
    n = targets.shape[1]
    return [
        Fit(n, round(accuracy * n), right, loss, alone, found.steps)
        for accuracy, right, loss, alone in zip(
            found.accuracy.tolist(), correct.tolist(), found.loss.tolist(), nats.tolist(), strict=True
        )
    ]


def decoding_capacity(accuracies: Mapping[int, Sequence[float]], threshold: float = DECODED) -> int:
    """The longest text, in tokens, whose mean accuracy (0 to 1) reaches the threshold; 0 if none does.

    Args:
        accuracies: by length, that of each text.
    """
    return max((length for length, given in accuracies.items() if given and fmean(given) >= threshold), default=0)


def token_gain(fits: Iterable[Fit]) -> float:
    """Mean number of tokens that are right with the memory beyond those that the model gets alone."""
    return fmean(fit.correct - fit.correct_without for fit in fits)


def information_gain(fits: Iterable[Fit], threshold: float = DECODED) -> float | None:
    """Mean nats by which the memory lowers the cross-entropy of a whole text.

    Texts that fit entirely are left out, since there the text ends before the memory does; None if all do.
    """
    gains = [fit.nats_without - fit.nats for fit in fits if fit.accuracy < threshold]
    return fmean(gains) if gains else None

"""Memory vectors found for one text by gradient descent, the model frozen: the loop of cramming."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Crammed:
    """What the loop found, for each of B rows.

    Attributes:
        parameters: the vectors, [B, ...] each.
        accuracy: [B] tokens of the text predicted right given the ones before (teacher-forced), 0 to 1.
        loss: [B] nats over the text, summed, at the same step.
        steps: how many steps were taken.
    """

    parameters: list[Tensor]
    accuracy: Tensor
    loss: Tensor
    steps: int


@contextmanager
def gradients_on() -> Iterator[None]:
    """Inside, gradients are recorded, whatever the caller switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def cram(
    predict: Callable[[list[Tensor]], Tensor],
    targets: Tensor,
    start: list[Tensor],
    steps: int = 5000,
    patience: int = 2000,
    learning_rate: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.9),
    weight_decay: float = 0.01,
) -> Crammed:
    """AdamW on memory vectors until every token of the text is predicted, rows independent of each other.

    Nothing but the vectors gets a gradient. The best step of each row is kept: the highest accuracy, then the lowest
    loss. A row is done when its accuracy is 1 or has not risen for `patience` steps; the loop ends with the last row.

    Args:
        predict: logits [B, N, V] from the vectors.
        targets: [B, N] what they should predict.
        start: first values [B, ...] of the vectors.
        steps: at most so many.
        patience, learning_rate, betas, weight_decay: as the paper has them.
    """
    with gradients_on():
        vectors = [given.detach().clone().float().requires_grad_(True) for given in start]
        optimiser = torch.optim.AdamW(vectors, lr=learning_rate, betas=betas, weight_decay=weight_decay)
        B = targets.shape[0]
        best = Crammed([v.detach().clone() for v in vectors], torch.full((B,), -1.0), torch.full((B,), torch.inf), 0)
        best.accuracy, best.loss = best.accuracy.to(targets.device), best.loss.to(targets.device)
        improved = torch.zeros(B, dtype=torch.long, device=targets.device)
        for step in range(steps + 1):
            logits = predict(vectors).float()
            nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            accuracy, loss = (logits.detach().argmax(-1) == targets).float().mean(1), nats.detach().sum(1)
            improved[accuracy > best.accuracy] = step
            better = (accuracy > best.accuracy) | ((accuracy == best.accuracy) & (loss < best.loss))
            for kept, vector in zip(best.parameters, vectors, strict=True):
                kept[better] = vector.detach()[better]
            best.accuracy = torch.where(better, accuracy, best.accuracy)
            best.loss = torch.where(better, loss, best.loss)
            best.steps = step
            if step == steps or bool(((best.accuracy == 1) | (step - improved >= patience)).all()):
                break
            # A row's own mean: what another row holds changes nothing in it.
            found = torch.autograd.grad(nats.mean(1).sum(), vectors)
            for vector, gradient in zip(vectors, found, strict=True):
                vector.grad = gradient
            optimiser.step()
    return best

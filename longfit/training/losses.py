"""The losses' arithmetic, in fp32: cross-entropy, divergence from a teacher, token importance. Pure functions."""

import torch
from torch import Tensor


def log_likelihoods(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability [B, T] of `ids` [B, T] under `logits` [B, T, V]."""
    return -torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of `values` [B, T] by `weights` [B, T]; 0 where every weight is 0."""
    weights = weights.to(values.dtype)
    # A row that is padding may hold anything, so its values are put out, not multiplied by 0.
    return values.masked_fill(weights == 0, 0.0).mul(weights).sum() / weights.sum().clamp_min(1e-9)


def cross_entropy(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean negative log-likelihood of `ids` [B, T] by `weights` [B, T], in nats."""
    return weighted_mean(-log_likelihoods(logits, ids), weights)


def divergence(
    teacher: Tensor, student: Tensor, weights: Tensor, top_k: int | None = None, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) of next-token distributions, weighted mean over tokens, in nats.

    Args:
        teacher, student: logits [B, T, V].
        weights: [B, T].
        top_k: compare the teacher's k likeliest tokens and the rest as one more; never more than the whole divergence,
            and equal to it at k = V. (CEPED stores the top k the same way, and may drop the rest.)
        temperature: divides both logits; the result is multiplied by its square, as usual.
    """
    wanted = torch.log_softmax(teacher.float() / temperature, -1)
    given = torch.log_softmax(student.float() / temperature, -1)
    if top_k is not None and top_k < wanted.shape[-1]:
        kept, places = wanted.topk(top_k, -1)
        wanted = torch.cat([kept, _rest(kept)], -1)
        chosen = given.gather(-1, places)
        given = torch.cat([chosen, _rest(chosen)], -1)
    return temperature**2 * weighted_mean((wanted.exp() * (wanted - given)).sum(-1), weights)


def _rest(logs: Tensor) -> Tensor:
    """Log of the probability [..., 1] that the log-probabilities [..., k] leave."""
    return torch.log1p(-logs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))


def importance(full: Tensor, segment: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """Weights [B, T] that favour tokens which depend on the context; their mean stays that of `weights`.

    w ~ exp(min(log P(x | context) - log P(x | segment alone), gamma)): a token that the context makes likelier weighs
    more. Deng et al. 2025, "A Silver Bullet or a Compromise", segment-wise token importance estimation.

    Args:
        full, segment: log-likelihoods [B, T] under the original model, with the context and without.
        weights: [B, T] that they multiply.
        gamma: the largest exponent.
    """
    raw = (full - segment).clamp(max=gamma).exp()
    return weights * raw / weighted_mean(raw, weights).clamp_min(1e-9)

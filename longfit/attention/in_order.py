"""Attention by position: every token of a forward attends to what stands before it, wherever it stands."""

import torch
from torch import Tensor

from longfit.attention.base import Scene


def attend_in_order(scene: Scene) -> tuple[Tensor, Tensor]:
    """Attention of tokens that come again and of the new ones behind them, for one row.

    Each attends to the stored entries and to the tokens of this forward at positions up to its own. The logits of all
    pairs exist at once, so this is for few tokens.

    Returns:
        out [1, H, Q, Dv] and the log-sum-exp [1, H, Q] in fp32.
    """
    B, H, Q, D = scene.queries.shape
    G, n = scene.keys.shape[1], scene.stored
    places = asking = _places(scene)
    packed = scene.queries.reshape(B, G, H // G * Q, D)
    logits = torch.matmul(packed, scene.keys.mT).float()
    if scene.stored_keys is not None and scene.positions is not None:
        logits = torch.cat([torch.matmul(packed, scene.stored_keys.mT).float(), logits], -1)
        places = torch.cat([scene.positions[0, 0].long(), places])
    logits = logits.mul_(scene.scaling).view(B, G, H // G, Q, -1).masked_fill_(places > asking[:, None], float("-inf"))
    log_sum_exp = logits.logsumexp(-1, keepdim=True)
    weights = logits.sub_(log_sum_exp).exp_().to(scene.values.dtype).view(B, G, H // G * Q, -1)
    out = torch.matmul(weights[..., n:], scene.values)
    if scene.stored_keys is not None and scene.stored_values is not None:
        out += torch.matmul(weights[..., :n], scene.stored_values)
        scene.read_bytes += scene.stored_keys.nbytes + scene.stored_values.nbytes
    return out.reshape(B, H, Q, -1), log_sum_exp.reshape(B, H, Q)


def _places(scene: Scene) -> Tensor:
    """Positions [Q] of the tokens of the forward."""
    again = torch.zeros(0, dtype=torch.long, device=scene.queries.device) if scene.again is None else scene.again
    new = scene.queries.shape[2] - again.shape[0]
    return torch.cat([again, torch.arange(scene.first, scene.first + new, device=again.device)])

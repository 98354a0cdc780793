"""The reader's input embeddings: how large they are, which slots and projectors are matched to, and how near a slot is
to some of them."""

import torch
from torch import Tensor

from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.modules import rms

ROWS = 4096
NEARNESS_SCALE = 20.0


def embedding_sample(backbone: Backbone) -> Tensor:
    """[N, E] fp32: up to 4,096 input embeddings spread over the vocabulary, scaled where the model scales them."""
    rows = backbone.model.get_input_embeddings().weight.shape[0]
    step = -(-rows // ROWS)
    with torch.no_grad():
        return backbone.embed(torch.arange(0, rows, step, device=backbone.device)[None])[0].float()


def embedding_size(backbone: Backbone) -> float:
    """Root mean square of the input embeddings."""
    return float(rms(embedding_sample(backbone)).mean())


def token_nearness(slots: Tensor, ids: Tensor, sizes: Tensor, table: Tensor) -> Tensor:
    """Mean over tokens of -log softmax_v(20 cos(slot, embedding v)) at the token, in nats.

    Near 0 where every slot is at its token's embedding, log V where it is as near to any other. The scale is that of a
    contrastive loss at a temperature of 0.05; a slot amid r embeddings at right angles has a cosine of 1 / sqrt(r) to
    each.

    Args:
        slots: [B, N, E].
        ids: [B, n] the tokens of all slots, one group after the other.
        sizes: [N] tokens of each slot, n in all.
        table: [V, E] the model's input embeddings.
    """
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(ids.device)
    unit = torch.nn.functional.normalize(table.detach(), dim=-1)
    near = NEARNESS_SCALE * (torch.nn.functional.normalize(slots.to(table.dtype), dim=-1) @ unit.T).float()
    return -near.log_softmax(-1)[:, owner].gather(-1, ids[..., None]).mean()

"""How large the reader's input embeddings are: what slots and projectors are matched to."""

import torch
from torch import Tensor

from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.modules import rms

ROWS = 4096


def embedding_sample(backbone: Backbone) -> Tensor:
    """[N, E] fp32: up to 4,096 input embeddings spread over the vocabulary, scaled where the model scales them."""
    rows = backbone.model.get_input_embeddings().weight.shape[0]
    step = -(-rows // ROWS)
    with torch.no_grad():
        return backbone.embed(torch.arange(0, rows, step, device=backbone.device)[None])[0].float()


def embedding_size(backbone: Backbone) -> float:
    """Root mean square of the input embeddings."""
    return float(rms(embedding_sample(backbone)).mean())

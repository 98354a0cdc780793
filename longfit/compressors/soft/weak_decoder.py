"""The gist study's auto-encoder: a decoder of one layer that spells out what a single slot stands for."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longfit.cache import SLIDING
from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.encoded import Encoded
from longfit.compressors.soft.modules import SlotEmbedding, rms
from longfit.compressors.soft.store import moved


def slot_entries(backbone: Backbone, encoded: Encoded, slots: Tensor) -> Tensor:
    """Keys (rotated back to position 0) and values [B, N, L, W] of `slots` [N] in the L full-attention layers."""
    taken = []
    for index, entries in enumerate(encoded.layers or ()):
        if backbone.types[index] == SLIDING:
            continue
        chosen, rotary = entries.pick(slots.to(entries.positions.device)), backbone.rotary(index)
        if rotary is not None:
            chosen = moved(rotary, chosen, torch.zeros_like(chosen.positions))
        taken.append(torch.cat([chosen.keys, chosen.values], -1).transpose(1, 2).flatten(2).float())
    return torch.stack(taken, 2)


class WeakDecoder(nn.Module):
    """From a slot's keys and values to the tokens it stands for, through one Transformer layer and the model's own
    head: `[g, ae, x_1, ..., x_r-1]` predicts `x_1, ..., x_r` (Deng et al. 2025, section 5).

    The study does not say how keys and values of many layers enter one layer. Here each layer's are brought to unit
    size, averaged with trained weights, and mapped to one vector `g`; places are told by fixed sines.

    Args:
        layers: L that `slot_entries` gives.
        entry_width: W, of a layer's keys and values.
        embeddings: [N, E] embeddings of the vocabulary, which the cue starts like.
    """

    def __init__(self, layers: int, entry_width: int, embeddings: Tensor) -> None:
        super().__init__()
        width = embeddings.shape[1]
        heads = next(n for n in (8, 4, 2, 1) if width % n == 0)
        self.size = float(rms(embeddings).mean())
        self.mix = nn.Parameter(torch.zeros(layers))
        self.lift = nn.Linear(entry_width, width, bias=False)
        self.cue = SlotEmbedding(1, embeddings)
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)

    @classmethod
    def of(cls, backbone: Backbone) -> "WeakDecoder":
        """For a model: the widths of its layers' entries are looked at, not computed."""
        with torch.no_grad():
            like = torch.zeros(1, 1, dtype=torch.long, device=backbone.device)
            given = backbone.run(backbone.embed(like), like[0])
        full = [e for kind, e in zip(backbone.types, given.entries, strict=True) if kind != SLIDING]
        key, value = full[0].keys, full[0].values
        return cls(len(full), key.shape[1] * (key.shape[-1] + value.shape[-1]), backbone.vocabulary())

    def forward(self, entries: Tensor, tokens: Tensor) -> Tensor:
        """Hidden states [N, r, E] that predict r tokens.

        Args:
            entries: [N, L, W].
            tokens: [N, r, E] embeddings of the tokens, of which the last is not read.
        """
        shares = self.mix.softmax(0)
        unit = (shares[:, None] * entries / rms(entries)).sum(1)
        slot = self.lift(unit)[:, None]
        read = torch.cat([slot, self.cue(tokens.shape[0], slot.dtype), tokens[:, :-1].float()], 1)
        S = read.shape[1]
        causal = torch.ones(S, S, dtype=torch.bool, device=read.device).triu(1)
        return self.norm(self.layer(read + self.size * sines(S, read), src_mask=causal))[:, 1:]

    def loss(self, backbone: Backbone, entries: Tensor, ids: Tensor, sources: Tensor) -> Tensor:
        """Mean cross-entropy, nats a token.

        Args:
            entries: [B, N, L, W] of N slots.
            ids: [B, n] the context.
            sources: [N, 2] what each slot stands for.
        """
        sizes = sources[:, 1] - sources[:, 0]
        steps = torch.arange(int(sizes.max()))
        there = (steps[None] < sizes[:, None]).to(ids.device)
        places = (sources[:, :1] + steps).clamp(max=ids.shape[1] - 1).to(ids.device)
        texts = ids[:, places].flatten(0, 1)
        hidden = self(entries.flatten(0, 1), backbone.embed(texts))
        chosen = there.repeat(ids.shape[0], 1)
        logits = backbone.logits(hidden[chosen].to(backbone.dtype)[None])[0]
        return F.cross_entropy(logits.float(), texts[chosen])


def sines(length: int, like: Tensor) -> Tensor:
    """[S, E] the original Transformer's place vectors, for vectors like `like` [..., E]."""
    E = like.shape[-1]
    rates = 10000.0 ** (-torch.arange(0, E, 2, device=like.device) / E)
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :E]

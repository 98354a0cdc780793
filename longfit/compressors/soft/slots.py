"""What all methods with soft slots share: raw sinks first, segments one after the other, a source for every slot."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.compressors.soft.base import LearnedCompressor
from longfit.compressors.soft.embeddings import token_nearness
from longfit.compressors.soft.encoded import Encoded, spans_of


@dataclass
class SlotCompressor(LearnedCompressor):
    """A method whose memory is input embeddings: it writes `slots` only.

    Sinks enter as the embeddings they are; everything else of a segment goes through `slots`. Segments are compressed
    alone and stand one after the other, at rotary positions 0 to M - 1.

    A loss of its own, "slot_ae": the tokens that a slot stands for have to be the nearest embeddings to it, see
    `token_nearness`; ours.
    """

    memory = "soft"

    def slots(self, ids: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        """Slots [B, m, E] for ids [B, n], n > 0, and how many of the n tokens each one stands for, [m]."""
        raise NotImplementedError

    def encode(self, ids: Tensor, past: Encoded | None, ratio: int) -> Encoded:
        sinks = self.cut_sinks(ids, past)
        made = self.slots(ids[:, sinks:], ratio) if ids.shape[1] > sinks else None
        return self.joined(ids, past, made)

    def auxiliary(self, encoded: Encoded, ids: Tensor, ratio: int) -> dict[str, Tensor]:
        sinks = min(self.sink_tokens, ids.shape[1])
        spans = encoded.sources[sinks:]
        sizes, table = spans[:, 1] - spans[:, 0], self.backbone.model.get_input_embeddings().weight
        if encoded.soft is None or not len(sizes) or int(sizes.sum()) != ids.shape[1] - sinks:
            return {}
        return {"slot_ae": token_nearness(encoded.soft[:, sinks:], ids[:, sinks:], sizes, table)}

    def joined(self, ids: Tensor, past: Encoded | None, made: tuple[Tensor, Tensor] | None) -> Encoded:
        """The context so far with the segment ids [B, n], of which all but the sinks became `made` (see `slots`)."""
        sinks, first = self.cut_sinks(ids, past), 0 if past is None else past.tokens_in
        soft = self.backbone.embed(ids[:, :sinks])
        sources = spans_of(torch.ones(sinks, dtype=torch.long), first)
        if made is not None:
            soft = torch.cat([soft, made[0].to(soft.dtype)], 1)
            sources = torch.cat([sources, spans_of(made[1], first + sinks)])
        if past is not None:
            assert past.soft is not None
            soft, sources = torch.cat([past.soft, soft], 1), torch.cat([past.sources, sources])
        return Encoded(first + ids.shape[1], sources, soft.shape[1], soft=soft)

"""Cramming into keys and values: a prefix for every layer, optimised for one text."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.compressors.soft.cramming import Cramming
from longfit.compressors.soft.encoded import Encoded, Entries, spans_of
from longfit.compressors.soft.layout import group_sizes
from longfit.compressors.soft.optimise import Crammed, gradients_on
from longfit.errors import InputError
from longfit.shapes import ModelShape


@dataclass
class CrammingKV(Cramming):
    """`Cramming` with keys and values of every layer instead of input embeddings (a prefix found for one text): 2 L
    times as many numbers for each slot.

    Source: the loop of Kuratov et al. 2025 on the prefixes of Li and Liang 2021; it starts with the keys and values
    that the model gives for the soft form's noise.

    Deviations and options: those of `Cramming`; the first token of a segment has to be given, since nothing but keys
    and values stands before it. A segment's prefix takes the places after those of the segments before it. In sliding
    layers it is seen from within the window only.
    """

    name = "cramming_kv"
    source = "Kuratov et al. 2025, with the prefixes of Li and Liang 2021"
    summary = "keys and values of every layer optimised for one text; the ceiling of learned key-value slots"
    memory = "kv"
    packed = True
    trains = "nothing; the keys and values themselves, for each text"

    predict_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predict_first:
            raise InputError(f"{self.name}: nothing but keys and values stands before the first token to predict it")

    def encode(self, ids: Tensor, past: Encoded | None, ratio: int) -> Encoded:
        first, place = (0, 0) if past is None else (past.tokens_in, past.next_position)
        sizes = group_sizes(ids.shape[1], ratio)
        sources = spans_of(sizes, first)
        self.last = self.crammed(ids, sizes.shape[0], place=place)
        layers = self.entries(self.last.parameters, place, self.backbone.dtype)
        if past is not None:
            assert past.layers is not None
            sources = torch.cat([past.sources, sources])
            layers = tuple(before.join(new) for before, new in zip(past.layers, layers, strict=True))
        return Encoded(first + ids.shape[1], sources, place + sizes.shape[0], layers=layers)

    def crammed(self, ids: Tensor, vectors: int, first: int | None = None, place: int = 0) -> Crammed:
        """`vectors` keys and values of every layer for ids [B, n], at rotary positions from `place` on."""
        positions = torch.arange(place, place + vectors, device=ids.device)
        sources = torch.zeros(vectors, 2, dtype=torch.long)
        with gradients_on():
            ids = ids.clone()  # an inference tensor cannot be part of a graph
            with torch.no_grad(), self.reading(None):
                begun = self.backbone.run(self.noise(ids, vectors).to(self.backbone.dtype), positions).entries

            def predict(flat: list[Tensor]) -> Tensor:
                layers = self.entries(flat, place, self.backbone.dtype)
                return self.read(Encoded(0, sources, place + vectors, layers=layers), ids)

            return self.optimised(predict, ids[:, 1:], [tensor for entries in begun for tensor in entries[:2]])

    def bytes_for(self, tokens: int, shape: ModelShape, ratio: int | None = None) -> int:
        return shape.entry_kv_bytes * shape.layers * self.slots_for(tokens, ratio)  # sliding layers hold it too

    def entries(self, flat: list[Tensor], place: int, dtype: torch.dtype) -> tuple[Entries, ...]:
        """Keys and values of every layer, from the list that is optimised."""
        positions = torch.arange(place, place + flat[0].shape[2], device=flat[0].device)
        pairs = zip(flat[::2], flat[1::2], strict=True)
        return tuple(Entries(keys.to(dtype), values.to(dtype), positions) for keys, values in pairs)

"""Cramming: memory vectors optimised for one text, the ceiling of what any encoder could write into them."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from longfit.compressors.soft.embeddings import embedding_sample
from longfit.compressors.soft.encoded import Encoded
from longfit.compressors.soft.layout import group_sizes
from longfit.compressors.soft.optimise import Crammed, cram, gradients_on
from longfit.compressors.soft.slots import SlotCompressor
from longfit.errors import InputError


@dataclass
class Cramming(SlotCompressor):
    """Input embeddings from which the frozen model predicts the segment's own tokens, found by gradient descent on this
    segment alone. Nothing is trained beforehand and nothing is learned for another text; it takes minutes where an
    encoder takes one pass, and shows how much the slots can hold.

    Source: Kuratov et al. 2025, "Cramming 1568 Tokens into a Single Vector and Back Again", and its code: vectors start
    as noise with the embeddings' spread; AdamW with learning rate 1e-2, betas (0.9, 0.9), weight decay 0.01; at most
    5,000 steps, fewer when every token is right or accuracy has not risen for 2,000; the vectors of the best step stay.

    Deviations: the first token is predicted from the memory as well (in the paper it is given; `predict_first=False`);
    the optimised vectors are fp32 whatever the model is; one seed for every text. A slot's source is its share of the
    segment, though every slot holds something of all of it.

    Options besides the common ones (`rank` has no use):
        steps, patience: when to stop.
        learning_rate, weight_decay: of AdamW.
        predict_first: whether the memory has to give the first token too.
        seed: of the noise it starts with.
    """

    name = "cramming"
    source = "Kuratov et al. 2025, Cramming 1568 Tokens into a Single Vector"
    summary = "embeddings optimised for one text until the frozen model says it back; the ceiling of learned slots"
    trains = "nothing; the slots themselves, for each text"
    left_out = "texts and random words for the capacity study (see capacity.py for its figures)"
    needs_training = False
    adapters_used = ()
    losses: ClassVar[dict[str, float]] = {}

    ratio: int = 32
    sink_tokens: int = 0
    steps: int = 5000
    patience: int = 2000
    learning_rate: float = 1e-2
    weight_decay: float = 0.01
    predict_first: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("steps", "patience"):
            if getattr(self, option) < 1:
                raise InputError(f"{self.name}: {option} has to be at least 1, got {getattr(self, option)}")
        if self.sink_tokens:
            raise InputError(f"{self.name}: the slots are optimised to stand first; sink_tokens has to be 0")

    def encode(self, ids: Tensor, past: Encoded | None, ratio: int) -> Encoded:
        """`slots` for the segment; `last` says how well they hold it."""
        self.last: Crammed | None = None
        return super().encode(ids, past, ratio)

    def slots(self, ids: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        sizes = group_sizes(ids.shape[1], ratio)
        self.last = self.crammed(ids, sizes.shape[0])
        return self.last.parameters[0].to(self.backbone.dtype), sizes

    def crammed(self, ids: Tensor, vectors: int, first: int | None = None) -> Crammed:
        """`vectors` input embeddings for ids [B, n], and how well they hold them.

        Args:
            first: the first token to predict; by option if left out.
        """
        given = (0 if self.predict_first else 1) if first is None else first
        with gradients_on():
            ids = ids.clone()  # an inference tensor cannot be part of a graph
            start = self.noise(ids, vectors)
            return self.optimised(lambda soft: self.predicted(soft[0], ids, given), ids[:, given:], [start])

    def optimised(self, predict: Any, targets: Tensor, start: list[Tensor]) -> Crammed:
        return cram(
            predict,
            targets,
            start,
            steps=self.steps,
            patience=self.patience,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
        )

    def predicted(self, soft: Tensor, ids: Tensor, first: int) -> Tensor:
        """Logits [B, n - first, V] of `ids[:, first:]` after slots [B, M, E]."""
        M = soft.shape[1]
        empty = torch.zeros(M, 2, dtype=torch.long)
        return self.read(Encoded(0, empty, M, soft=soft), ids, first=first)

    def noise(self, ids: Tensor, vectors: int) -> Tensor:
        """[B, vectors, E], the same for every row."""
        like = embedding_sample(self.backbone)
        random = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(vectors, like.shape[1], generator=random).to(like.device)
        return (like.std() * drawn).expand(ids.shape[0], -1, -1)

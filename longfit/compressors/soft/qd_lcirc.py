"""QD-LCIRC: before the latents read a segment, they read the question."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.cross import GatedCross
from longfit.compressors.soft.lcirc import LCIRC
from longfit.errors import InputError


@dataclass
class QDLCIRC(LCIRC):
    """`LCIRC` with one more gated block in which the latents attend to the question's token embeddings, before every
    segment. The memory is for that question only: compress inside `asking(question_ids)`.

    Source: An et al. 2025, "LCIRC", the query-dependent form, and its code (learning rate 2e-5 from LCIRC's weights,
    gradients through 8 random segments).

    Deviations and options: those of `LCIRC`. With its gate closed it is LCIRC.
    """

    name = "qd_lcirc"
    source = "An et al. 2025, LCIRC (query-dependent)"
    summary = "LCIRC whose latents read the question before every segment"
    trains = "perceiver, gated cross-attention, the question's block"
    left_out = (
        "a start from LCIRC's weights; back-propagation through 8 random segments only; segments of random length; the "
        "loss after every segment; forgetting of all but the last 50 segments"
    )
    query_aware = True

    def make(self, backbone: Backbone) -> nn.ModuleDict:
        self.question: Tensor | None = None
        modules = super().make(backbone)
        modules["mixer"] = GatedCross(backbone.width, *self.sizes(backbone))
        return modules

    @contextmanager
    def asking(self, question: Tensor) -> Iterator[None]:
        """Inside, contexts are compressed for the question, ids [B or 1, Q]."""
        before, self.question = self.question, question
        try:
            yield
        finally:
            self.question = before

    def prepared(self, latents: Tensor) -> Tensor:
        if self.question is None:
            raise InputError(f"{self.name} compresses for a question: call compress inside asking(question_ids)")
        mixer = self.modules["mixer"]
        assert isinstance(mixer, GatedCross)
        question = self.backbone.embed(self.question)
        mixed: Tensor = mixer(latents, *mixer.attention.project(question))
        return mixed

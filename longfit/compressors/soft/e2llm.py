"""E2LLM: a pretrained text encoder reads chunks; attention pooling and an adapter make one slot of each."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longfit.compressors.soft.adapters import Adapters, SplitAdapters
from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.base import ENCODER, READER
from longfit.compressors.soft.embeddings import embedding_size
from longfit.compressors.soft.foreign import Foreign, checked, reader_tokenizer, texts, tokens_of
from longfit.compressors.soft.layout import stride_sizes
from longfit.compressors.soft.modules import Projector
from longfit.compressors.soft.pooling import AttentionPool
from longfit.compressors.soft.slots import SlotCompressor
from longfit.errors import InputError

TARGETS = ("query", "key", "value", "dense", *("q_proj", "k_proj", "v_proj", "o_proj", "Wqkv", "Wo", "Wi"))


@dataclass
class E2LLM(SlotCompressor):
    """The text of every `ratio` tokens goes through a pretrained text encoder; one learned query with 4 heads gathers
    all its token states (vPMA), and an adapter takes the result to the reader's embeddings: one slot for each chunk.

    Source: Liao et al. 2025, "E2LLM" (no public code; from the paper as others describe it): chunks of about 512
    characters (about 100 tokens), LoRA on the encoder and the reader; cross-entropy of the answer plus 1e-7 to 1e-9
    times the reconstruction of the chunks; learning rate 1e-4.

    Deviations: chunks are counted in the reader's tokens, so that the slots of a context are known beforehand, and do
    not end at sentences; a small encoder (22 M parameters) stands where the paper has GTE-large; the adapter is two
    linear maps, matched in size to the reader's embeddings; the reconstruction is the common one, not over a sliding
    window of chunks.

    Options besides the common ones:
        encoder: a name that `longfit.text_encoders.load_text_encoder` takes, or a pair (model, tokenizer) of an encoder
            that gives `last_hidden_state`.
        tokenizer: of the reader; the one that lies with the model if left out.
        heads: of the pooling.
        encoder_adapter, reader_adapter: whether each has LoRA.
    """

    name = "e2llm"
    source = "Liao et al. 2025, E2LLM"
    summary = "a pretrained text encoder, attention pooling and an adapter: one embedding for each chunk of 100 tokens"
    trains = "encoder LoRA, attention pooling, adapter, reader LoRA"
    left_out = "chunks of characters that end at sentences; reconstruction over a sliding window of chunks"
    foreign_encoder = True
    adapters_used = (ENCODER, READER)
    losses: ClassVar[dict[str, float]] = {"ce": 1.0, "ae": 1e-7}

    ratio: int = 100
    encoder: Any = "minilm-l6"
    tokenizer: Any = field(default=None, repr=False)
    heads: int = 4
    encoder_adapter: bool = True
    reader_adapter: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.encoder = checked(self.encoder, self.name)
        if self.encoder is None:
            raise InputError(f"{self.name} needs an encoder: a name or a pair (model, tokenizer)")

    def make(self, backbone: Backbone) -> nn.ModuleDict:
        self.text_encoder = self.encoder
        if isinstance(self.encoder, str):
            from longfit.text_encoders import load_text_encoder  # a floor above: only a name needs it

            self.text_encoder = Foreign(self.encoder, *load_text_encoder(self.encoder, device=backbone.device))
        self.text_encoder.model.requires_grad_(False)
        self.source_tokenizer = reader_tokenizer(self.tokenizer, backbone.model, self.name)
        config = self.text_encoder.model.config
        if config.hidden_size % self.heads:
            raise InputError(f"{self.name}: {self.heads} heads do not divide the encoder's width {config.hidden_size}")
        projector = Projector(config.hidden_size, backbone.width, embedding_size(backbone), hidden=backbone.width)
        return nn.ModuleDict({"pooling": AttentionPool(config.hidden_size, self.heads), "projector": projector})

    def make_adapters(self, model: Any, ranks: dict[str, int]) -> SplitAdapters:
        wanted = {ENCODER: self.encoder_adapter, READER: self.reader_adapter}
        encoder, reader = ({n: r for n, r in ranks.items() if n == name and wanted[n]} for name in (ENCODER, READER))
        return SplitAdapters(Adapters(self.text_encoder.model, encoder, targets=TARGETS), Adapters(model, reader))

    def options(self) -> dict[str, Any]:
        named = self.encoder.name if isinstance(self.encoder, Foreign) else self.encoder
        return {name: value for name, value in super().options().items() if name != "tokenizer"} | {"encoder": named}

    @property
    def encoder_model(self) -> Any:
        return self.text_encoder.model

    @property
    def encoder_window(self) -> int | None:
        return getattr(self.text_encoder.model.config, "max_position_embeddings", None)

    def slots(self, ids: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        sizes = stride_sizes(ids.shape[1], ratio)
        chunks = [texts(self.source_tokenizer, part) for part in ids.split(sizes.tolist(), 1)]
        rows = [chunk[row] for row in range(ids.shape[0]) for chunk in chunks]
        states, seen = self.states(rows)
        pooled = self.modules["pooling"](states.to(self.backbone.device), seen.to(self.backbone.device))
        return self.modules["projector"](pooled[:, 0]).unflatten(0, (ids.shape[0], -1)), sizes

    def states(self, rows: list[str]) -> tuple[Tensor, Tensor]:
        """The encoder's token states [N, T, Ee] of N texts, and bool [N, T] which of them count.

        Raises:
            InputError: a text is longer than the encoder takes.
        """
        model = self.text_encoder.model
        ids, lengths = tokens_of(self.text_encoder.tokenizer, rows, model.device)
        self.check_window(ids.shape[1], "a chunk of the text", "choose a smaller ratio")
        seen = (torch.arange(ids.shape[1]) < lengths[:, None]).to(ids.device)
        with self.encoding():
            return model(input_ids=ids, attention_mask=seen.long()).last_hidden_state, seen

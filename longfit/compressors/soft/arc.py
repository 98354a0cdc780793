"""ARC-Encoder: an LM without its top reads both ways; its last layer asks with the mean of each group of tokens."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from longfit.compressors.soft.adapters import WEIGHTS, Adapters, SplitAdapters
from longfit.compressors.soft.artifact import UNTRAINED
from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.base import ENCODER, READER
from longfit.compressors.soft.embeddings import embedding_sample, embedding_size
from longfit.compressors.soft.foreign import Foreign, checked, reader_tokenizer, same_vocabulary, texts, tokens_of
from longfit.compressors.soft.layout import group_sizes
from longfit.compressors.soft.modules import Projector, SlotEmbedding
from longfit.compressors.soft.pooled_queries import group_weights, run_pooled
from longfit.compressors.soft.slots import SlotCompressor
from longfit.errors import InputError

CUES = ("ae", "continuation")
LOWER = "lower segment_tokens"


@dataclass
class Arc(SlotCompressor):
    """The encoder is an LM without its last layers, final norm, head and causal mask. In the last layer that is left,
    the mean of each group of `ratio` hidden states is the query and the residual, while keys and values come from all
    tokens. Two linear maps without an activation take the result to the reader's embeddings. The reader is untouched,
    unless `reader_adapter` gives it LoRA.

    One encoder serves several readers, each with a projector and cues of its own: `for_reader` binds one more reader to
    the same encoder, and with `train_encoder=False` a new reader is made by training those alone.

    Source: Pilchen, Grave and Pérez 2025, "ARC-Encoder", and its code: 2 layers cut; groups near-equal, the longer ones
    first; pooled queries at rotary positions 0 to m - 1 against keys at 0 to n - 1; 20 % of the steps rebuild the text
    after one cue (`ae`, the paper's <Rec>), 80 % continue it after the other (`continuation`, <Cont>); AdamW with
    learning rates 1e-5 (encoder) to 5e-5 (projector), of at most 256 tokens.

    Deviations: the encoder is trained by LoRA (the paper trains all of it; its LoRA costs 0.6 points); the projector is
    matched in size to the reader's embeddings; cues are embeddings of the reader and do not pass the projector; a
    sliding layer that comes last sees the whole segment. Where the encoder has its own tokenizer, text goes from one to
    the other and the number of slots is counted in the reader's tokens, so that `ratio` says what the reader saves; a
    segment that ends within a character loses it.

    Options besides the common ones:
        encoder: None for the reader's own weights; a name for `longfit.load`, or a pair (model, tokenizer).
        tokenizer: of the reader; the one that lies with the model if left out. Only for an encoder of its own.
        cut_layers: how many of the encoder's last layers are left out.
        bottleneck: width between the two linear maps; two thirds of the encoder's (the paper's proportion) if 0.
        encoder_weights: a folder with an encoder adapter from an earlier training, to begin with.
        train_encoder: False to train only what belongs to the reader.
        reader_adapter: whether the reader has an adapter; ours (the paper's readers are untouched).
    """

    name = "arc"
    source = "Pilchen, Grave and Pérez 2025, ARC-Encoder"
    summary = (
        "an LM without its top layers pools queries in its last one; a frozen reader gets r times fewer embeddings"
    )
    trains = "encoder LoRA, a projector and two cues for each reader; with reader_adapter LoRA of the reader"
    adapters_used = (ENCODER, READER)
    left_out = (
        "full training of the encoder; joint training of several readers, one drawn in each step (the loop trains one, "
        "and a further one's own parts afterwards); plain tokens before the slots of a continuation; the fine-tuning "
        "stage on few-shot examples; pooling by clusters or in several layers; quantised storage"
    )
    losses: ClassVar[dict[str, float]] = {"ae": 0.2, "continuation": 0.8}

    encoder: Any = None
    tokenizer: Any = field(default=None, repr=False)
    cut_layers: int = 2
    bottleneck: int = 0
    encoder_weights: str | None = None
    train_encoder: bool = True
    reader_adapter: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.encoder = checked(self.encoder, self.name)
        if self.cut_layers < 0:
            raise InputError(f"{self.name}: cut_layers has to be at least 0, got {self.cut_layers}")

    def make(self, backbone: Backbone) -> nn.ModuleDict:
        self.owns_encoder = True
        self.reading_encoder, self.encoder_tokenizer = backbone, None
        if self.encoder is not None:
            own = Foreign.loaded(self.encoder, backbone) if isinstance(self.encoder, str) else self.encoder
            own.model.requires_grad_(False)
            self.reading_encoder, self.encoder_tokenizer = Backbone(own.model), own.tokenizer
        if self.kept_layers < 1:
            raise InputError(f"{self.name}: cut_layers={self.cut_layers} leaves none of the encoder's layers")
        return self.reader_modules(backbone)

    def reader_modules(self, backbone: Backbone) -> nn.ModuleDict:
        """What belongs to one reader, and the tokenizer that its ids need."""
        self.source_tokenizer = None
        if self.encoder_tokenizer is not None:
            own = reader_tokenizer(self.tokenizer, backbone.model, self.name)
            self.source_tokenizer = None if same_vocabulary(own, self.encoder_tokenizer) else own
            if self.source_tokenizer is None:  # else only the text of a segment tells how many tokens it becomes
                self.check_window(self.segment_tokens, f"a segment of {self.segment_tokens} tokens", LOWER)
        sample, width = embedding_sample(backbone), self.reading_encoder.width
        projector = Projector(width, backbone.width, embedding_size(backbone), self.bottleneck or 2 * width // 3)
        cues = nn.ModuleDict({name: SlotEmbedding(1, sample) for name in CUES})
        return nn.ModuleDict({"projector": projector, "cues": cues})

    def make_adapters(self, model: Any, ranks: dict[str, int]) -> Adapters | SplitAdapters:
        begins = self.encoder_weights if self.adapter == UNTRAINED else None  # what was trained has its own
        if begins is not None and not (Path(begins) / ENCODER / WEIGHTS).is_file():
            raise InputError(f"{self.name}: encoder_weights={begins!r} holds no {ENCODER}/{WEIGHTS}")
        reader = {name: rank for name, rank in ranks.items() if name == READER and self.reader_adapter}
        encoder = {name: rank for name, rank in ranks.items() if name == ENCODER}
        alone, layers = self.reading_encoder.model is not model, {ENCODER: self.kept_layers}
        first = Adapters(self.reading_encoder.model, encoder | ({} if alone else reader), layers=layers)
        self.encoder_lora = first.only(ENCODER)
        if begins is not None:
            self.encoder_lora.load(Path(begins))
        self.reader_lora = Adapters(model, reader) if alone and reader else None
        return SplitAdapters(first, self.reader_lora) if self.reader_lora else first

    def for_reader(self, model: Any, tokenizer: Any = None, train_encoder: bool = True) -> "Arc":
        """One more reader for the encoder of this bound compressor: a new projector, new cues and, with
        `reader_adapter`, LoRA of its own. It works as long as this one is not released.

        Args:
            model: the other reader.
            tokenizer: its tokenizer; the one that lies with the model if left out.
            train_encoder: whether what it calls its parameters includes the shared encoder's.
        """
        other = copy.copy(self)
        if other.encoder_tokenizer is None:
            other.encoder_tokenizer = reader_tokenizer(self.tokenizer, self.backbone.model, self.name)
        other.tokenizer, other.train_encoder, other.owns_encoder = tokenizer, train_encoder, False
        other.backbone = Backbone(model)
        other.modules = other.reader_modules(other.backbone).to(other.backbone.device)
        reads = READER in self.lora.names
        other.reader_lora = Adapters(model, {READER: self.rank}) if reads else None
        other.lora = SplitAdapters(self.encoder_lora, other.reader_lora) if other.reader_lora else self.encoder_lora
        return other

    def release(self) -> None:
        if self.owns_encoder:
            super().release()
        elif self.reader_lora is not None:
            self.reader_lora.remove()

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        return {name: ps for name, ps in super().parameters().items() if self.train_encoder or name != ENCODER}

    def options(self) -> dict[str, Any]:
        named = self.encoder.name if isinstance(self.encoder, Foreign) else self.encoder
        return {name: value for name, value in super().options().items() if name != "tokenizer"} | {"encoder": named}

    @property
    def encoder_model(self) -> Any:
        model = self.reading_encoder.model
        return None if model is self.backbone.model else model

    @property
    def encoder_window(self) -> int | None:
        return getattr(self.reading_encoder.config, "max_position_embeddings", None)

    @property
    def kept_layers(self) -> int:
        return len(self.reading_encoder.layers) - self.cut_layers

    def slots(self, ids: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        sizes = group_sizes(ids.shape[1], ratio)
        given, lengths = self.encoder_ids(ids)
        states = self.pooled(given, lengths, len(sizes))
        return self.modules["projector"](states.to(self.backbone.device)), sizes

    @torch.no_grad()
    def warm_start(self, contexts: Sequence[Tensor]) -> None:
        """The projector that takes the encoder's states at 1x nearest to the reader's embeddings of the same tokens, by
        least squares; ours. From there on a slot can be read a little, and what is read can be trained. The states at
        1x and the tokens correspond one to one where encoder and reader have one vocabulary, and nearly so else."""
        states, wanted = [], []
        for ids in contexts:
            given, lengths = self.encoder_ids(ids)
            states.append(self.pooled(given, lengths, ids.shape[1]).flatten(0, 1))
            wanted.append(self.backbone.embed(ids).flatten(0, 1))
        projector = cast(Projector, self.modules["projector"])
        projector.fit(torch.cat(states).to(wanted[0].device), torch.cat(wanted))

    def encoder_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's ids [B, m] of the reader's ids [B, n], and how many of each row count [B]."""
        if self.source_tokenizer is None:
            return ids, torch.full((ids.shape[0],), ids.shape[1])
        rows = texts(self.source_tokenizer, ids)
        return tokens_of(self.encoder_tokenizer, rows, self.reading_encoder.device)

    def pooled(self, ids: Tensor, lengths: Tensor, m: int) -> Tensor:
        """The encoder's states [B, m, Es] for its own ids [B, n], of which `lengths` [B] count.

        Raises:
            InputError: they are more than the encoder takes at once.
        """
        self.check_window(ids.shape[1], "a segment", LOWER)
        ids = torch.nn.functional.pad(ids, (0, max(0, m - ids.shape[1])))
        n, encoder = ids.shape[1], self.reading_encoder
        seen = (torch.arange(n) < lengths[:, None]).to(ids.device)
        weights = torch.stack([group_weights(int(length), m, n) for length in lengths])
        positions = torch.arange(n, device=ids.device)
        allowed = seen[:, None].expand(-1, n, -1)
        with self.encoding():
            given = encoder.run(encoder.embed(ids), positions, allowed=allowed, stop_at=self.kept_layers - 1)
            assert given.stopped is not None
            return run_pooled(*given.stopped, given.hidden, weights, seen, encoder.additive)

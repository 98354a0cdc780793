"""The contract of learned compressors, and their registry.

A method is one class in one file: what it trains, how a segment becomes slots (`encode`) and, where that is not the
ordinary way, how the reader uses them (`read`). Cutting a context into segments, the reader's cache, generation,
training, saving and loading are done elsewhere, once, for all.
"""

import copy
import hashlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from longfit.compressors.soft import artifact
from longfit.compressors.soft.adapters import Adapters, SplitAdapters
from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.encoded import Encoded
from longfit.compressors.soft.layout import segment_spans
from longfit.errors import InputError, PrecisionWarning
from longfit.registry import register
from longfit.shapes import ModelShape

_REGISTRY: dict[str, type["LearnedCompressor"]] = {}
ENCODER, READER = "encoder", "reader"
HIGHEST_RATIO = 128


@dataclass
class LearnedCompressor:
    """Base of every method that turns a stretch of context into fewer slots which a causal LM then reads.

    Declarations (class attributes):
        name, source, summary: as for every compressor.
        memory: where slots enter: "kv" (keys and values of every layer), "soft" (input embeddings) or "cross" (states
            that injected cross-attention reads).
        trains: what training moves, in words.
        left_out: what of the paper is not here, in words.
        packed: keys and values (memory "kv") stand at positions 0 to M - 1, and the reader goes on at M; else they keep
            those of the text. Soft slots are packed by nature.
        needs_training: without trained weights its slots say nothing, so it refuses to run untrained.
        recurrent: a segment is encoded in sight of the memory so far.
        query_aware: the memory depends on the question (and is good for no other).
        adapters_used: the LoRA adapters it has: "encoder", "reader".
        shared_adapter: one model writes and reads: the encoder's adapter acts while reading too.
        foreign_encoder: another model encodes, given as an option.
        losses: weights of the losses that the paper trains with, for recipes that name none.

    Attributes (options):
        ratio: tokens of the context for each slot.
        segment_tokens: the longest stretch that is encoded at once.
        window_tokens: last tokens of a context that stay raw, next to what is asked.
        sink_tokens: first tokens of a context that stay raw.
        rank: of the LoRA adapters; 0 for none.
        adapter: trained weights: a folder, or a name that longfit ships; "untrained" for initial weights (to train
            from); None for the training-free form of methods that have one.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    memory: ClassVar[str] = "kv"
    trains: ClassVar[str] = ""
    left_out: ClassVar[str] = ""
    packed: ClassVar[bool] = False
    needs_training: ClassVar[bool] = True
    recurrent: ClassVar[bool] = False
    query_aware: ClassVar[bool] = False
    adapters_used: ClassVar[tuple[str, ...]] = (ENCODER,)
    shared_adapter: ClassVar[bool] = False
    foreign_encoder: ClassVar[bool] = False
    losses: ClassVar[dict[str, float]] = {"kl": 1.0}

    ratio: int = 4
    segment_tokens: int = 1024
    window_tokens: int = 16
    sink_tokens: int = 1
    rank: int = 16
    adapter: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register("compressor", _REGISTRY, cls)

    def __post_init__(self) -> None:
        for option, least in (
            ("ratio", 1),
            ("segment_tokens", 1),
            ("window_tokens", 0 if self.memory == "soft" else 1),
            ("sink_tokens", 0),
            ("rank", 0),
        ):
            if getattr(self, option) < least:
                raise InputError(f"{self.name}: {option} has to be at least {least}, got {getattr(self, option)}")

    # -- what a method writes -------------------------------------------------------------------------------------

    def make(self, backbone: Backbone) -> nn.ModuleDict:
        """The method's own trained modules, in fp32 (adapters come from `adapters_used`)."""
        return nn.ModuleDict()

    def encode(self, ids: Tensor, past: Encoded | None, ratio: int) -> Encoded:
        """The context so far with one more segment.

        Args:
            ids: [B, n] the segment.
            past: the context before it; None at the start.
            ratio: tokens for each slot.
        """
        raise NotImplementedError

    def read(self, encoded: Encoded, ids: Tensor, first: int = 1, cue: str | None = None) -> Tensor:
        """Logits [B, T - first, V] that predict `ids[:, first:]` from the context and the ids before.

        Args:
            ids: [B, T] what follows the context.
            first: the first token to predict. 0 needs something that predicts it: soft slots or a cue.
            cue: name of a learned embedding between context and ids (methods that have cues).

        Raises:
            InputError: `first` is 0 with neither.
        """
        embeds = self.backbone.embed(ids)
        before = encoded.soft.to(embeds.dtype) if encoded.soft is not None else embeds[:, :0]
        if cue is not None:
            before = torch.cat([before, self.cue(cue, embeds)], 1)
        M = before.shape[1]
        if first == 0 and M == 0:
            raise InputError(f"{self.name}: nothing stands before the first token; keep one raw token or give a cue")
        start = 0 if encoded.soft is not None else encoded.next_position
        embeds = torch.cat([before, embeds], 1)
        positions = torch.arange(start, start + embeds.shape[1], device=ids.device)
        with self.reading(encoded):
            given = self.backbone.run(embeds, positions, past=encoded.layers, past_bias=self.slot_bias(encoded))
        return self.backbone.logits(given.hidden[:, M + first - 1 : -1])

    def slot_bias(self, encoded: Encoded) -> Tensor | None:
        """[B, P] added to the reader's attention logits of past entries while training; None for nothing."""
        return None

    def auxiliary(self, encoded: Encoded, ids: Tensor, ratio: int) -> dict[str, Tensor]:
        """Losses of the method's own, by name, for the context `ids` [B, n] that became `encoded`."""
        return {}

    def warm_start(self, contexts: Sequence[Tensor]) -> None:
        """Better first weights than the usual ones, from contexts [B, n] of the training data, before the first step.

        Raises:
            InputError: the method has no such start.
        """
        raise InputError(f"{self.name} has no warm start; leave warm_start out of the recipe")

    @contextmanager
    def reading(self, encoded: Encoded | None) -> Iterator[None]:
        """Inside, the model reads: its adapter acts, and what the method injects into it is there."""
        with self.lora.using(self.reads_with):
            yield

    @contextmanager
    def asking(self, question: Tensor) -> Iterator[None]:
        """Inside, contexts are compressed for the question, ids [B or 1, Q] (query-aware methods)."""
        yield

    # -- what all of them have ------------------------------------------------------------------------------------

    def bind(self, model: Any) -> "LearnedCompressor":
        """Make the modules and adapters for a model, with the trained weights that `adapter` names. `release` takes
        them away again.

        Options that are at their defaults become those of the trained weights.

        Raises:
            InputError: the method needs trained weights and `adapter` names none.
            LoadError, FingerprintError: the trained weights are damaged, or another model's or method's.

        Warns:
            PrecisionWarning: the model is in float16, which ICAE's authors warn of: bfloat16 or float32.
        """
        trained = self._trained(model)
        self.backbone = Backbone(model)
        if self.backbone.dtype == torch.float16:
            warnings.warn(
                f"{self.name}: the model is in float16, in which what slots hold overflows above 65,504 and small "
                'gradients vanish; load it with dtype="bfloat16" or "float32"',
                PrecisionWarning,
                stacklevel=2,
            )
        trains = self.rank and self.adapter is not None  # else the training-free form, which has nothing to adapt
        ranks = {name: self.rank for name in self.adapters_used} if trains else {}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # initial weights are the same each time
            self.modules = self.make(self.backbone).to(self.backbone.device)
            self.lora = self.make_adapters(model, ranks)
        self._trained_ratios: tuple[int, ...] = ()
        if trained is not None:
            try:
                trained.load_into(self)
            except Exception:
                self.release()
                raise
            self._trained_ratios = trained.trained_ratios
        return self

    def _trained(self, model: Any) -> artifact.Artifact | None:
        """The trained weights that `adapter` names, checked against the model; None to start with initial weights."""
        if self.adapter is None and self.needs_training:
            fitting = ", ".join(artifact.shipped_for(self.name, model)) or "none for this model"
            raise InputError(
                f"{self.name} says nothing untrained: give adapter= a folder that `longfit train` wrote, or a name "
                f'that longfit ships ({fitting}); "untrained" runs it with initial weights'
            )
        if self.adapter is None or self.adapter == artifact.UNTRAINED:
            return None
        found = artifact.find(self.adapter)
        found.check_base(model)
        found.adopt(self)
        return found

    def make_adapters(self, model: Any, ranks: dict[str, int]) -> Adapters | SplitAdapters:
        """The LoRA adapters; methods that encode with another model put the encoder's there."""
        return Adapters(model, ranks)

    def release(self) -> None:
        """Take everything out of the model that `bind` put there."""
        self.lora.remove()

    def copy(self) -> "LearnedCompressor":
        """The same options, bound to nothing."""
        return copy.copy(self)

    def encoding(self) -> Any:
        """Inside, the encoder's adapter acts."""
        return self.lora.using(ENCODER)

    def compress(self, ids: Tensor, past: Encoded | None = None, ratio: int | None = None) -> Encoded:
        """A whole context [B, n], segment by segment, after what `past` holds."""
        encoded, ratio = past, ratio or self.ratio
        self.check_ratio(ratio)
        for start, stop in self.spans(ids.shape[1]):
            encoded = self.encode(ids[:, start:stop], encoded, ratio)
            self.observer(stop)
        if encoded is None:
            raise InputError(f"{self.name}: the context is empty")
        return encoded

    def check_ratio(self, ratio: int) -> None:
        """Warn where the weights were trained, but not for this ratio. Every way to compress a context asks it."""
        if self.trained_ratios and ratio not in self.trained_ratios:
            known = ", ".join(map(str, self.trained_ratios))
            warnings.warn(f"{self.name}: the adapter was trained for {known} tokens a slot, not for {ratio}")

    def spans(self, tokens: int) -> list[tuple[int, int]]:
        """Start and stop of the segments that `tokens` tokens are cut into."""
        return segment_spans(tokens, self.segment_tokens)

    def cue(self, name: str, like: Tensor) -> Tensor:
        """The learned embedding [B, 1, E] called `name`.

        Raises:
            InputError: the method has none of that name.
        """
        if name not in self.cues:
            raise InputError(f"{self.name} has no cue {name!r}; it has {', '.join(self.cues) or 'none'}")
        return cast(nn.ModuleDict, self.modules["cues"])[name](like.shape[0], like.dtype)

    @property
    def reads_with(self) -> str | None:
        """Name of the adapter that acts while reading; None where the untouched model reads."""
        name = ENCODER if self.shared_adapter else READER
        return name if name in self.lora.names else None

    @property
    def packs(self) -> bool:
        """The reader's positions are packed."""
        return self.packed or self.memory != "kv"

    @property
    def cues(self) -> list[str]:
        """Names of the learned embeddings that may stand between context and ids."""
        return list(cast(nn.ModuleDict, self.modules["cues"])) if "cues" in self.modules else []

    @property
    def encoder_model(self) -> Any:
        """The model that encodes for a bound method, where it is another one than the reader; else None."""
        return None

    @property
    def encoder_window(self) -> int | None:
        """Tokens that a bound method's encoder takes at once; None where nothing but the reader's own window limits
        it."""
        return None

    def check_window(self, tokens: int, what: str, remedy: str) -> None:
        """Refuse what the encoder has no positions for.

        Args:
            tokens: of the encoder, read at once.
            what: they are.
            remedy: what to change.

        Raises:
            InputError: they are more than the encoder's window.
        """
        window = self.encoder_window
        if window is not None and tokens > window:
            raise InputError(
                f"{self.name}: {what} takes {tokens} tokens of its encoder, whose window is {window}; {remedy}"
            )

    def slots_for(self, tokens: int, ratio: int | None = None) -> int:
        """Slots and sinks that a context of `tokens` tokens becomes."""
        ratio = ratio or self.ratio
        spans = segment_spans(tokens, self.segment_tokens)
        sinks = min(self.sink_tokens, spans[0][1]) if spans else 0
        return sinks + sum(-(-(stop - start - (sinks if start == 0 else 0)) // ratio) for start, stop in spans)

    def bytes_for(self, tokens: int, shape: ModelShape, ratio: int | None = None) -> int:
        """Bytes of the slots and sinks that a context of `tokens` tokens becomes, for a reader of this shape. Sliding
        layers hold the raw entries of their window."""
        slots = self.slots_for(tokens, ratio)
        if self.memory != "kv":
            return slots * shape.hidden_size * shape.dtype_bytes
        raw = min(tokens, shape.sliding_window - 1)
        return shape.entry_kv_bytes * (shape.full_layers * slots + shape.sliding_layers * raw)

    def ratios(self) -> tuple[int, ...]:
        """Ratios that may be used, ascending: those the weights were trained for, or from its own up without any."""
        if self.trained_ratios:
            return tuple(sorted(self.trained_ratios))
        return (self.ratio,) if self.needs_training else tuple(range(self.ratio, self.ratio + HIGHEST_RATIO))

    @staticmethod
    def observer(read: int) -> None:
        """Told how many tokens of a context are compressed; see `watched`."""

    @contextmanager
    def watched(self, observer: Callable[[int], None]) -> Iterator[None]:
        """Inside, `observer` is told after every segment how many tokens of the context are compressed."""
        self.__dict__["observer"] = observer
        try:
            yield
        finally:
            del self.__dict__["observer"]

    # What is drawn while training comes from it (segments of random length); nothing is random without it.
    rng: ClassVar[random.Random | None] = None

    @contextmanager
    def drawing(self, rng: random.Random) -> Iterator[None]:
        """Inside, the method trains: what it draws comes from `rng`."""
        self.__dict__["rng"] = rng
        try:
            yield
        finally:
            del self.__dict__["rng"]

    @property
    def trained_ratios(self) -> tuple[int, ...]:
        """Ratios that the loaded weights were trained for; none without an adapter."""
        return getattr(self, "_trained_ratios", ())

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """What training moves, by group: "encoder", "reader" (adapters) and the method's own modules by name."""
        groups = {name: self.lora.parameters(name) for name in self.lora.names}
        groups |= {name: list(module.parameters()) for name, module in self.modules.items()}
        return {name: given for name, given in groups.items() if given}

    def options(self) -> dict[str, Any]:
        """The method's options by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def fingerprint(self) -> str:
        """The method, its options and a hash of its trained weights, in one line."""
        digest = hashlib.sha256()
        for name, group in sorted(self.parameters().items()):
            for parameter in group:
                digest.update(f"{name}{tuple(parameter.shape)}".encode())
                digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        options = {name: value for name, value in self.options().items() if name != "adapter"}
        return f"{self.name}{options} {digest.hexdigest()[:16]}"

    def cut_sinks(self, ids: Tensor, past: Encoded | None) -> int:
        """How many of a segment's first tokens are sinks: those of the first segment only."""
        return 0 if past is not None else min(self.sink_tokens, ids.shape[1])


def available() -> dict[str, type[LearnedCompressor]]:
    """All registered learned compressors by name."""
    return dict(sorted(_REGISTRY.items()))

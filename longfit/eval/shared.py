"""One prefill for many methods: record everything once, trim it by each method in turn."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longfit.attention import AttentionPatch
from longfit.cache import FitCache, Ledger, View
from longfit.cache.retrim import retrim
from longfit.compressors import KVCompressor
from longfit.families import decoder_of
from longfit.model import unwrap, wrap


@dataclass
class Recorder(KVCompressor):
    """Keeps everything, and the state that each of some methods would have gathered on the way."""

    methods: tuple[KVCompressor, ...] = ()
    window: int = 1

    needs_queries = True
    observes = True
    persists = True

    @property
    def replays(self) -> bool:  # type: ignore[override]
        return any(method.replays for method in self.methods)

    @property
    def repeat_ids(self) -> tuple[int, ...]:
        return next((getattr(m, "repeat_ids", ()) for m in self.methods if m.replays), ())

    @property
    def score_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(name for method in self.methods for name in method.score_names))

    @property
    def window_tokens(self) -> int:
        return self.window

    def bind(self, model: Any) -> None:
        for method in self.methods:
            method.bind(model)

    def observe(self, view: View) -> None:
        for method in self.methods:
            if method.observes and method.replays == bool(view.replayed):
                method.observe(view)

    def score(self, view: View) -> Tensor:
        return torch.zeros(view.positions.shape, device=view.positions.device)


@dataclass
class Recording:
    """Everything that one prefill left; `logits` [1, 1, V] are those of its last token."""

    model: Any
    cache: FitCache
    logits: Tensor
    question_tokens: int

    def trimmed(self, method: KVCompressor, keep_ratio: float, patch: AttentionPatch | None = None) -> FitCache:
        """What `method` would have left of the same input, read in one chunk; `patch` decodes from it."""
        question = self.question_tokens if method.query_aware else 0
        ledger = Ledger(None, keep_ratio, method.geometry == "packed")
        return retrim(self.cache, decoder_of(self.model), method, ledger, question, patch)


@contextmanager
def recording(model: Any, ids: Tensor, methods: list[KVCompressor], question_tokens: int = 0) -> Iterator[Recording]:
    """Read `ids` [1, T] once, in one chunk, keeping everything that `methods` need to choose afterwards.

    Args:
        question_tokens: the last tokens are the question.
    """
    watching = {type(method).__name__: method for method in methods if method.observes}
    window = max([question_tokens, *(method.window_tokens for method in methods)], default=1)
    recorder = Recorder(tuple(watching.values()), window=max(1, window))
    wrapped = wrap(model, recorder, budget="100%", chunk_tokens=ids.shape[1], geometry="original")
    try:
        cache = wrapped.longfit.new_cache(decoder_of(wrapped), 1, ids.shape[1])
        outputs = wrapped(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        unwrap(model)
    yield Recording(model, cache, outputs.logits, question_tokens)

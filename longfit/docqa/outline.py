"""What reading documents will come to, said before it begins."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longfit.docqa.document import Document
from longfit.docqa.prompt import context_of, question_ids
from longfit.families import decoder_of
from longfit.reporting import named
from longfit.units import format_bytes, kept_for_ratio

CALIBRATION_TOKENS = 192
# A shorter text is read sooner than its time is estimated.
LEAST_TO_CALIBRATE = 1024


@dataclass(frozen=True)
class Outline:
    """What is about to be done.

    Attributes:
        documents, pages: how many; no pages where the formats have none.
        tokens: of the whole context, and of the question where it is known.
        method: the compressor with its options.
        kept_tokens: entries a layer that the budget holds; None where a learned compressor takes what it takes.
        kv_bytes, full_kv_bytes: about what these take, and all of them would.
        chunk_tokens: tokens of a chunk.
        seconds: about how long the reading takes; None for texts that are read at once.
    """

    documents: int
    pages: int
    tokens: int
    method: str
    kept_tokens: int | None
    kv_bytes: int | None
    full_kv_bytes: int
    chunk_tokens: int
    seconds: float | None

    def __str__(self) -> str:
        what = f"{self.documents} documents" if self.documents > 1 else "1 document"
        pages = f", {self.pages:,} pages" if self.pages else ""
        kept = f"{self.method} keeps what it makes of them"
        if self.kept_tokens is not None and self.kv_bytes is not None:
            kept = (
                f"{self.method} keeps {self.kept_tokens:,} a layer, about {format_bytes(self.kv_bytes)} of "
                f"{format_bytes(self.full_kv_bytes)}"
            )
        took = "" if self.seconds is None else f"; about {duration(self.seconds)}"
        return f"reading {what}{pages}: {self.tokens:,} tokens; {kept}; chunks of {self.chunk_tokens:,}{took}"


def outline(
    model: Any, tokenizer: Any, documents: Sequence[Document], question: str | None = None, first: bool = True
) -> Outline:
    """What a wrapped model will make of documents, and about how long it takes.

    The time is that of a short forward of the base model, multiplied: by the tokens, by what attention to the kept
    entries adds (in multiplications, see `work`), and by two for methods that read each chunk twice. It knows nothing
    of scoring.

    Args:
        first: as for `context_of`.

    Raises:
        InputError: no document, or an empty one.
        BudgetError: the budget cannot be met for these documents.
    """
    ids, _ = context_of(tokenizer, documents, first)
    tokens = len(ids) + (len(question_ids(tokenizer, question)) if question else 0)
    context = model.longfit
    cache = context.new_cache(decoder_of(model), 1, tokens)
    full = context.shape.full_kv_bytes(tokens)
    limit, ratio = context.limit_of(cache), context.budget.keep_ratio
    limit = kept_for_ratio(tokens, ratio) if limit is None and ratio is not None else limit
    kept = None if context.free or limit is None else min(tokens, limit)
    chunk = min(cache.chunk_tokens, tokens)
    seconds = None
    if tokens >= LEAST_TO_CALIBRATE:
        seconds = tokens * _seconds_per_token(model, ids) * (2 if context.method.replays else 1)
        attended = tokens // 2 if context.free else (kept or 0) + chunk // 2
        seconds *= work(model, attended) / work(model, CALIBRATION_TOKENS // 2)
    return Outline(
        documents=len(documents),
        pages=sum(len(document.pages) for document in documents),
        tokens=tokens,
        method=named(context),
        kept_tokens=kept,
        kv_bytes=None if kept is None else int(full * kept / tokens),
        full_kv_bytes=full,
        chunk_tokens=chunk,
        seconds=seconds,
    )


def work(model: Any, attended: int) -> int:
    """Multiplications for one token that attends to so many: the weights, and keys and values in every full layer."""
    shape = model.longfit.shape
    weights: int = model.num_parameters(exclude_embeddings=True)
    return weights + shape.full_layers * shape.query_heads * (shape.key_dim + shape.value_dim) * attended


@torch.no_grad()
def _seconds_per_token(model: Any, ids: list[int]) -> float:
    given = torch.tensor([ids[:CALIBRATION_TOKENS]], device=model.device)
    with model.disabled():
        model(given[:, :8], use_cache=False, logits_to_keep=1)  # what only the first forward does
        started = time.perf_counter()
        logits = model(given, use_cache=False, logits_to_keep=1).logits
        float(logits[0, -1, 0])  # waits for a GPU
    return (time.perf_counter() - started) / given.shape[1]


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""What a run did, read from the cache that it filled."""

from longfit.cache import FitCache
from longfit.compressors import KeepAll
from longfit.context import FitContext
from longfit.report import FitReport


def report_of(context: FitContext, cache: FitCache, peak_bytes: int | None) -> FitReport:
    """The report of the runs that filled a cache; `peak_bytes` is None where it was not measured."""
    kept, seen = cache.kept_tokens, cache.tokens_in
    by_head = [layer.kept_by_head() for layer in cache.bounded]
    per_layer = [[n for row in rows for n in row] for rows in by_head]
    return FitReport(
        method=named(context),
        attention=None if context.patch is None else repr(context.patch),
        geometry="packed" if cache.ledger.packed else "original",
        question_aware=cache.question_aware,
        tokens_in=seen,
        kept_tokens=kept,
        keep_ratio=kept / seen if seen else 0.0,
        kept_per_layer=[sum(heads) / len(heads) if heads else 0.0 for heads in per_layer],
        kept_per_head=[rows[0] if rows else [] for rows in by_head],
        kv_bytes=cache.nbytes,
        full_kv_bytes=(cache.rows or 1) * context.shape.full_kv_bytes(seen),
        budget="none" if context.free else str(context.budget),
        limit_tokens=None if context.free else context.limit_of(cache),
        prompt_tokens=None if cache.shortened is None else max(len(kept) for kept in cache.shortened.places),
        chunk_tokens=cache.chunk_tokens,
        chunks=cache.chunks,
        peak_bytes=peak_bytes,
        prefill_seconds=cache.prefill_seconds,
        decode_seconds=cache.decode_seconds,
        score_seconds=cache.score_seconds,
        new_tokens=cache.new_tokens,
        read_bytes=cache.read_bytes,
        offloaded_bytes=cache.offloaded_bytes,
        page_hits=cache.page_hits,
        page_reads=cache.page_reads,
        rebuilt_tokens=cache.rebuilt_tokens,
    )


def named(context: FitContext) -> str:
    """The compressors of a context, for its report."""
    before = [repr(step) for step in (context.prompt, context.encoder) if step is not None]
    return ", ".join(before if before and isinstance(context.method, KeepAll) else [*before, repr(context.method)])

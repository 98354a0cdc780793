"""What a run kept and spent."""

from dataclasses import asdict, dataclass
from typing import Any

from longfit.units import format_bytes


@dataclass(frozen=True)
class FitReport:
    """What the last `generate`, `compress` or forward of a wrapped model did. Everything here was measured.

    Attributes:
        method: the compressor with its options.
        attention: the attention that stood in for full attention, with its options; None for full attention.
        geometry: "original" or "packed" positions.
        question_aware: the question chose what stays.
        tokens_in: tokens that went through the cache, the longest row, padding excluded.
        kept_tokens: entries kept per layer, averaged over layers, rows and heads.
        keep_ratio: kept_tokens / tokens_in.
        kept_per_layer: entries kept in each compressible layer, averaged over rows and heads.
        kept_per_head: the same for each head of the first row, [layers][heads].
        kv_bytes: allocated for the cache between forwards.
        full_kv_bytes: what a plain cache of the same tokens would hold.
        budget: as given.
        limit_tokens: entries per layer that the budget allows; None for a ratio.
        chunk_tokens, chunks: size and number of the prefill's chunks.
        peak_bytes: peak memory above the start (see `PeakMeter`); None where it was not measured.
        prefill_seconds, decode_seconds, score_seconds: wall time; scoring is part of the other two.
        new_tokens: tokens decoded after the prefill.
        offloaded_bytes: keys and values on the slow side, which no budget counts.
        page_hits, page_reads: pages of the slow side that were asked for: on the fast side already, or read; by head.
        prompt_tokens: what a prompt compressor left of the input, the longest row; None where it left everything, or
            without one.
        rebuilt_tokens: released tokens that were forwarded again, all rows and steps.
        read_bytes: stored keys, values and indexes that attention read in all of these steps, full layers only.
    """

    method: str
    attention: str | None
    geometry: str
    question_aware: bool
    tokens_in: int
    kept_tokens: float
    keep_ratio: float
    kept_per_layer: list[float]
    kept_per_head: list[list[int]]
    kv_bytes: int
    full_kv_bytes: int
    budget: str
    limit_tokens: int | None
    chunk_tokens: int
    chunks: int
    peak_bytes: int | None
    prefill_seconds: float
    decode_seconds: float
    score_seconds: float
    new_tokens: int
    read_bytes: int
    offloaded_bytes: int = 0
    page_hits: int = 0
    page_reads: int = 0
    rebuilt_tokens: int = 0
    prompt_tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        name = self.method if self.attention is None else f"{self.method}, {self.attention}"
        peak = "" if self.peak_bytes is None else f", peak +{format_bytes(self.peak_bytes)}"
        prompt = "" if self.prompt_tokens is None else f"prompt shortened to {self.prompt_tokens:,} tokens, "
        share = f"{self.kept_tokens:,.0f} of {self.tokens_in:,} tokens ({100 * self.keep_ratio:.1f} %)"
        slow = f" and {format_bytes(self.offloaded_bytes)} on the slow side" if self.offloaded_bytes else ""
        again = f", {self.rebuilt_tokens:,} tokens forwarded again" if self.rebuilt_tokens else ""
        return (
            f"{name}: {prompt}kept {share} in {format_bytes(self.kv_bytes)} (full: {format_bytes(self.full_kv_bytes)})"
            f"{slow}{peak}{again}; {self.chunks} chunks of up to {self.chunk_tokens:,}; "
            f"prefill {self.prefill_seconds:.1f} s, decode {self.decode_seconds:.1f} s for {self.new_tokens} tokens"
        )

"""What an input costs a model in bytes, as functions of the entries kept and the chunk."""

from collections.abc import Callable
from dataclasses import dataclass

from longfit.shapes import ModelShape
from longfit.working_set import entry_bytes, working_set_terms

ScoreWorkspace = int | Callable[[int, int], int]


@dataclass(frozen=True)
class Costs:
    """Bytes of every part as functions of the kept entries N and the chunk C."""

    shape: ModelShape
    seen_tokens: int
    tokens: int
    batch_size: int
    entry_state_bytes: int
    layer_state_bytes: int
    score_workspace: ScoreWorkspace
    packed: bool

    @property
    def sliding_bytes(self) -> int:
        """What the sliding layers hold; at most a window each, without positions."""
        shape, entries = self.shape, min(self.seen_tokens, self.shape.sliding_window)
        numbers = shape.kv_heads * (shape.key_dim + shape.value_dim) * shape.dtype_bytes
        return self.batch_size * shape.sliding_layers * entries * numbers

    @property
    def full_bytes(self) -> int:
        """Keys and values that a plain model would hold."""
        shape = self.shape
        numbers = shape.kv_heads * (shape.key_dim + shape.value_dim) * shape.dtype_bytes
        return self.batch_size * shape.full_layers * self.seen_tokens * numbers + self.sliding_bytes

    def stored(self, kept: int) -> int:
        """Everything held between chunks when every compressible layer keeps ``kept`` entries."""
        per_layer = kept * entry_bytes(self.shape, self.entry_state_bytes) + self.layer_state_bytes
        return self.batch_size * self.shape.full_layers * per_layer + self.sliding_bytes

    def terms(self, kept: int, chunk: int) -> dict[str, int]:
        """The working set of one chunk, by name."""
        chunk = min(chunk, self.tokens)
        score = self.score_workspace
        return working_set_terms(
            self.shape,
            chunk_tokens=chunk,
            kept_tokens=kept,
            batch_size=self.batch_size,
            entry_state_bytes=self.entry_state_bytes,
            score_workspace_bytes=score if isinstance(score, int) else score(chunk, kept),
            trims=kept < self.seen_tokens,
            packed=self.packed,
        )

    def peak(self, kept: int, chunk: int) -> int:
        """What is stored, and the working set beside it."""
        return self.stored(kept) + sum(self.terms(kept, chunk).values())

    def most_kept(self, limit: int, chunk: int) -> int:
        """The largest N <= seen tokens whose peak is within ``limit``; -1 if even none fits.

        Keeping everything needs no room for trimming, so it is asked apart: the peak rises with N below it.
        """
        if self.peak(self.seen_tokens, chunk) <= limit:
            return self.seen_tokens
        low, high = -1, self.seen_tokens - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.peak(middle, chunk) <= limit:
                low = middle
            else:
                high = middle - 1
        return low

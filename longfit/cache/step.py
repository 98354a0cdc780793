"""What the current forward is for, shared by all layers of a cache."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Step:
    """Set by the wrapper before each forward, read by the layers while it runs.

    Attributes:
        phase: "prefill" or "decode".
        total_tokens: columns that this prefill will have seen when it ends.
        padding: for each row, the columns of this forward that are left padding.
        trailing: for each row, columns at the end of this forward that are padding (replays of a padded chunk: so that
            the row's probes stand right behind its tokens); empty if there are none.
        probe_tokens: tokens at the end of this forward that attend and score but are never stored: the question
            behind a chunk, or a replay of the chunk.
        question_tokens: tokens at the end of this forward whose queries score, stored or not; 0 if unknown.
        hold: store the chunk untrimmed; the whole cache is trimmed together afterwards.
        replayed_tokens: size of the chunk that this forward's probes replay; 0 when they do not.
        ids: [B, columns] token ids of this forward, padding included; None where embeddings came in.
        again: for each row, ascending positions of tokens at the front of this forward that were released before and
            are forwarded again; empty if there are none.
    """

    phase: str = "prefill"
    total_tokens: int = 0
    padding: list[int] = field(default_factory=list)
    trailing: list[int] = field(default_factory=list)
    probe_tokens: int = 0
    question_tokens: int = 0
    hold: bool = False
    replayed_tokens: int = 0
    ids: Tensor | None = None
    again: list[list[int]] = field(default_factory=list)

    @property
    def again_columns(self) -> int:
        """Columns at the front of this forward that are no new ones."""
        return max((len(row) for row in self.again), default=0)

    def places(self, row: int, first: int, columns: int, device: torch.device) -> Tensor:
        """Positions [columns] of the tokens of `row` in this forward, the first new one at `first`."""
        again = torch.tensor(self.again[row] if self.again else [], dtype=torch.int32, device=device)
        new = torch.arange(first, first + columns - again.shape[0], dtype=torch.int32, device=device)
        return torch.cat([again, new])

    def span(self, row: int, columns: int) -> slice:
        """The columns of this forward that are tokens of `row`."""
        return slice(self.padding[row], columns - (self.trailing[row] if self.trailing else 0))

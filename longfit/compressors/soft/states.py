"""What the methods share whose memory is read by cross-attention."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.compressors.soft.base import LearnedCompressor
from longfit.compressors.soft.encoded import Encoded
from longfit.errors import InputError


@dataclass
class StateCompressor(LearnedCompressor):
    """A method whose memory is states: it writes `states` and `attached` only.

    The context takes no places in the reader's own sequence: what follows it starts at rotary position 0. Nothing of it
    stays raw, so there are no sinks.
    """

    memory = "cross"

    sink_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink_tokens:
            raise InputError(f"{self.name}: nothing of a context stays raw in cross-attention; sink_tokens has to be 0")

    def states(self, ids: Tensor, past: Encoded | None, ratio: int) -> tuple[Tensor, Tensor]:
        """States [B, m, Es] of one segment [B, n], and where in it each one comes from, [m, 2]."""
        raise NotImplementedError

    def attached(self, states: Tensor) -> AbstractContextManager[None]:
        """Inside, the reader's layers attend to states [B, M, Es]."""
        raise NotImplementedError

    def encode(self, ids: Tensor, past: Encoded | None, ratio: int) -> Encoded:
        first = 0 if past is None else past.tokens_in
        states, sources = self.states(ids, past, ratio)
        sources = sources + first
        if past is not None:
            assert past.states is not None
            states, sources = torch.cat([past.states, states], 1), torch.cat([past.sources, sources])
        return Encoded(first + ids.shape[1], sources, 0, states=states)

    @contextmanager
    def reading(self, encoded: Encoded | None) -> Iterator[None]:
        with super().reading(encoded):
            if encoded is None or encoded.states is None:
                yield
            else:
                with self.attached(encoded.states):
                    yield

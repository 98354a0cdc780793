"""Several one-row caches as the rows of one batch: what is read once is asked many ways at once."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from longfit.cache.fit import FitCache
from longfit.cache.layer import HANDLE, BoundedLayer
from longfit.cache.together import trim_together
from longfit.errors import InputError


class RowsLayer(CacheLayerMixin):
    """One layer of several caches; each row of a forward goes to its own."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.own = layers
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand each row of the new keys [B, G, Q, D] and values [B, G, Q, Dv] to its cache; returns them, tagged."""
        for row, layer in enumerate(self.own):
            layer.update(key_states[row : row + 1], value_states[row : row + 1])
        handle = key_states.view(key_states.shape)
        setattr(handle, HANDLE, self)
        return handle, value_states

    def members(self) -> list[tuple[slice, Any]]:
        """Which rows of a forward go to which layer."""
        return [(slice(row, row + 1), layer) for row, layer in enumerate(self.own)]

    def get_seq_length(self) -> int:
        return self.own[0].get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.own[0].get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return -1


class RowsSlidingLayer(RowsLayer):
    """The same for a sliding layer: its rows hold as many tokens each, so they attend as one batch."""

    is_sliding = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns the keys [B, G, n, D] and values [B, G, n, Dv] that the forward attends to."""
        rows = [layer.update(key_states[r], value_states[r], *args, **kwargs) for r, layer in self.members()]
        return torch.cat([keys for keys, _ in rows]), torch.cat([values for _, values in rows])


class SideBySide(Cache):
    """A batch whose rows are caches of their own, each with its method and budget, that have seen as many tokens.

    The linear parts of the model run once for all rows, attention and trimming row by row as they would alone.

    Raises:
        InputError: a cache has several rows, or they have not seen as many tokens.
    """

    def __init__(self, caches: list[FitCache]) -> None:
        if not caches or any(cache.rows != 1 for cache in caches) or len({cache.seen for cache in caches}) != 1:
            raise InputError("caches that run side by side have one row each and have seen as many tokens")
        self.caches = caches
        layers = [_rows(list(row)) for row in zip(*(cache.own_layers for cache in caches), strict=True)]
        super().__init__(layers=cast(Any, layers))

    def begin(self, columns: int) -> Tensor:
        """Start a forward of `columns` tokens in every row; returns the rotary positions [B, columns]."""
        phase = "decode" if columns == 1 else "prefill"
        positions = [
            cache.begin(
                columns,
                None,
                1,
                phase=phase,
                total_tokens=cache.seen + columns,
                hold=cache.method.replays and phase == "prefill",
            )
            for cache in self.caches
        ]
        return torch.cat(positions)

    def end(self) -> None:
        """After a forward."""
        for cache in self.caches:
            cache.end()
            if cache.step.hold:
                trim_together(cache)


def _rows(layers: list[Any]) -> RowsLayer:
    return RowsLayer(layers) if isinstance(layers[0], BoundedLayer) else RowsSlidingLayer(layers)

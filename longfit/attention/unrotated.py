"""Keys and queries without their rotary positions, for attention that knows no distance or another one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longfit.attention.base import Scene
from longfit.cache import Rows, SideIndex, Store
from longfit.cache.ledger import ANGLE
from longfit.errors import UnsupportedModelError

Rotate = Callable[[Tensor, Tensor], Tensor]


def angles(store: Store) -> Tensor:
    """Rotary positions [B, G, n] at which the stored keys rest; in the packed geometry not those of the input."""
    return store.scores.get(ANGLE, store.positions).long()


def own_angles(scene: Scene) -> Tensor:
    """Rotary positions [Q] of the new tokens."""
    return torch.arange(scene.queries.shape[2], device=scene.queries.device) + scene.first_rotary


def queries_at(scene: Scene, place: int) -> Tensor:
    """The queries [B, H, Q, D] as if every new token stood at rotary position `place`."""
    assert scene.rotate is not None
    return scene.rotate(scene.queries, (place - own_angles(scene)).expand(scene.queries.shape[:3]))


def own_unrotated(scene: Scene, count: int | None = None) -> Tensor:
    """The first `count` (all by default) of the new keys [B, G, count, D] at rotary position 0."""
    assert scene.rotate is not None
    keys = scene.keys[:, :, :count]
    return scene.rotate(keys, -own_angles(scene)[:count].expand(keys.shape[:3]))


def stored_unrotated(scene: Scene) -> Tensor | None:
    """All stored keys [B, G, n, D] at rotary position 0; kept beside the rotated ones from one forward to the next."""
    store = scene.part.store
    if store is None or store.n == 0:
        return None
    assert scene.rotate is not None
    if not isinstance(scene.part.index, UnrotatedKeys):
        scene.part.index = UnrotatedKeys(scene.rotate)
    scene.part.index.follow(store)
    return scene.part.index.keys


class UnrotatedKeys(SideIndex):
    """The stored keys [B, G, n, D] at rotary position 0, in their own dtype."""

    def __init__(self, rotate: Rotate) -> None:
        super().__init__()
        self.rotate = rotate
        self.angles: Tensor | None = None
        self.rows: Rows | None = None

    @property
    def keys(self) -> Tensor:
        assert self.rows is not None
        return self.rows.used

    @property
    def nbytes(self) -> int:
        return 0 if self.rows is None else self.rows.nbytes

    def follow(self, store: Store) -> None:
        self.angles = angles(store)
        super().follow(store)
        self.angles = None

    def build(self, keys: Tensor) -> None:
        assert self.angles is not None
        self.rows = Rows(self.rotate(keys, -self.angles))

    def extend(self, keys: Tensor) -> None:
        assert self.rows is not None and self.angles is not None
        self.rows.append(self.rotate(keys, -self.angles[:, :, self.n :]))


def check_rotary(name: str, model: Any) -> None:
    """
    Raises:
        UnsupportedModelError: some layers have no rotary positions to take out.
    """
    config = model.config.get_text_config(decoder=True)
    if 0 in (getattr(config, "no_rope_layers", None) or []):
        raise UnsupportedModelError(
            f"{name} re-rotates keys, and {type(model).__name__} has layers without rotary positions; "
            'use attention="sliding_window"'
        )


def trained_window(model: Any) -> int:
    """Positions that the model was made for."""
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", 0) or 2**31)

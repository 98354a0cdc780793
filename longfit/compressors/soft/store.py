"""From a pass to what is kept of it: entries at their own positions (holes), or moved together (packed)."""

from torch import Tensor, arange, cat

from longfit.cache import SLIDING, Rotary
from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.encoded import Encoded, Entries
from longfit.errors import UnsupportedModelError


def moved(rotary: Rotary | None, entries: Entries, to: Tensor) -> Entries:
    """The same entries with their keys rotated at the positions `to` [M], in fp32 angles.

    Raises:
        UnsupportedModelError: the model has no rotary embedding.
    """
    if rotary is None:
        raise UnsupportedModelError("packed memory moves keys to new positions, which needs rotary embeddings")
    B, G, M, _ = entries.keys.shape
    by = (to - entries.positions).expand(B, M)[:, None].expand(-1, G, -1)
    return Entries(rotary.rotate(entries.keys, by), entries.values, to)


def stored(
    backbone: Backbone,
    new: tuple[Entries, ...],
    kept: Tensor,
    sources: Tensor,
    past: Encoded | None,
    tokens_in: int,
    *,
    packed: bool = False,
    window_from: Tensor | None = None,
) -> Encoded:
    """The past with what is kept of a pass. Sliding layers keep the last entries that fit their window, whatever is
    kept elsewhere.

    Args:
        new: entries of a pass, every layer.
        kept: [M] or [B, M] which of them stay in full-attention layers.
        sources: [M, 2] or [B, M, 2] what those stand for.
        tokens_in: tokens of the context so far.
        packed: the keys kept move to positions 0, 1, ... behind those of the past; the reader goes on right after
            them. In sliding layers the entries move too, so that they end there.
        window_from: [N] which entries count in sliding layers; all if left out.
    """
    if past is not None:
        rows = max(past.sources.ndim, sources.ndim)
        before, after = (
            s if s.ndim == rows else s.expand(new[0].keys.shape[0], -1, -1) for s in (past.sources, sources)
        )
        sources = cat([before, after], -2)
    M, device = sources.shape[-2], new[0].keys.device
    next_position = M if packed else tokens_in
    layers = []
    for index, entries in enumerate(new):
        window = backbone.windows[index]
        earlier = past.layers[index] if past is not None and past.layers is not None else None
        if backbone.types[index] == SLIDING and window is not None:
            chosen = entries if window_from is None else entries.pick(window_from.to(device))
            chosen = (chosen if earlier is None else earlier.join(chosen)).last(window - 1)
            if packed:
                to = arange(next_position - chosen.positions.shape[0], next_position, device=device)
                chosen = moved(backbone.rotary(index), chosen, to)
        else:
            chosen = entries.pick(kept.to(device))
            if packed:
                to = arange(M - kept.shape[-1], M, device=device)
                chosen = moved(backbone.rotary(index), chosen, to)
            chosen = chosen if earlier is None else earlier.join(chosen)
        layers.append(chosen)
    return Encoded(tokens_in, sources, next_position, layers=tuple(layers))


def soft_stored(soft: Tensor, sources: Tensor, past: Encoded | None, tokens_in: int) -> Encoded:
    """The past with more input embeddings `soft` [B, M, E] behind it."""
    if past is not None and past.soft is not None:
        soft, sources = cat([past.soft, soft], 1), cat([past.sources, sources])
    return Encoded(tokens_in, sources, sources.shape[0], soft=soft)

"""Left padding: attention masks become columns of padding, and columns of padding become attention masks."""

import torch
from torch import Tensor

from longfit.errors import InputError, UnsupportedFeatureError


def left_padding(mask: Tensor) -> list[int]:
    """Columns of left padding of each row of a mask [B, T].

    Raises:
        InputError: a row without a token, padding on the right or in between.
    """
    real = mask.bool()
    padding = (~real).long().cumprod(-1).sum(-1)
    if bool((padding == mask.shape[1]).any()):
        raise InputError("a row of the batch has no token: its attention_mask is all zeros")
    if bool((real.sum(-1) + padding != mask.shape[1]).any()):
        raise InputError(
            "padding has to be on the left for generation; set tokenizer.padding_side = 'left' "
            "(the mask has zeros after the first token of a row)"
        )
    return padding.tolist()


def padding_of(mask: Tensor | None, tokens: Tensor, seen: int, known: list[int] | None) -> list[int] | None:
    """Columns of left padding of each row of new tokens [B, T, ...]; None where no mask says so.

    Args:
        mask: [B, T] or [B, seen + T].
        seen: columns before the new tokens.
        known: what the first forward's mask said; None for the first forward.

    Raises:
        InputError: padding on the right, holes, a further turn with padding, or a mask of the wrong shape.
        UnsupportedFeatureError: a mask that is not [B, tokens].
    """
    if mask is None:
        return None
    if mask.ndim != 2:
        raise UnsupportedFeatureError(f"attention_mask has {mask.ndim} dimensions; longfit takes a mask [B, tokens]")
    B, T = tokens.shape[:2]
    if mask.shape[0] != B or mask.shape[1] not in (T, seen + T):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; expected [{B}, {seen + T}]: one entry for "
            "every token so far"
        )
    if known is None:
        return left_padding(mask)
    if not bool(mask[:, -T:].bool().all()):
        raise InputError("a further turn cannot bring padding; pad the first turn on the left instead")
    return known


def mask_of(padding: list[int] | None, columns: int, device: torch.device) -> Tensor | None:
    """The attention mask [B, columns] of rows with so many columns of left padding; None where no row has any."""
    if padding is None or not any(padding):
        return None
    return (torch.arange(columns, device=device)[None] >= torch.tensor(padding, device=device)[:, None]).long()

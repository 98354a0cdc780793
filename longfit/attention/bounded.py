"""The attention function of bounded cache layers, registered with transformers beside its mask function.

One function a backend: it finds the bounded layer by the tag that `BoundedLayer.update` puts on the keys, attends part
by part and hands the real queries to the layer. Calls without the tag (no cache, another cache, a sliding layer) go to
the backend exactly as transformers would have made them; their mask is built only then.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longfit.attention.base import Scene
from longfit.cache import HANDLE, BoundedLayer, Look, Step
from longfit.errors import UnsupportedFeatureError, UnsupportedModelError

# transformers takes names that contain "flash" for a request to import flash-attn.
NAMES = {"sdpa": "longfit_sdpa", "eager": "longfit_eager", "flash_attention_2": "longfit_fa2"}
UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "position_bias")


class LazyMask:
    """A mask that is built when a layer turns out to need one; bounded layers never do.

    Holds the arguments that transformers gave its mask function, and the mask once built.
    """

    def __init__(self, backend: str, arguments: dict[str, Any]) -> None:
        self.backend, self.arguments = backend, arguments
        self.masks: dict[torch.device, Any] = {}

    def build(self, device: torch.device) -> Any:
        """What the backend's own mask function gives, on `device`."""
        if device not in self.masks:
            mask = ALL_MASK_ATTENTION_FUNCTIONS[self.backend](**self.arguments)
            self.masks[device] = mask.to(device) if isinstance(mask, Tensor) else mask
        return self.masks[device]


def register() -> None:
    """Make the attention and mask functions of every backend known to transformers."""
    for backend, name in NAMES.items():
        AttentionInterface.register(name, _attention(backend))
        AttentionMaskInterface.register(name, _mask(backend))


def _mask(backend: str) -> Callable[..., LazyMask]:
    def lazy_mask(**arguments: Any) -> LazyMask:
        return LazyMask(backend, arguments)

    return lazy_mask


def _attention(backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def bounded_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layer = getattr(key, HANDLE, None)
        if layer is None:
            if isinstance(attention_mask, LazyMask):
                attention_mask = attention_mask.build(query.device)
            function = base_function(module, backend)
            return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        for name in UNSUPPORTED_ARGUMENTS:
            if kwargs.get(name) is not None:
                raise UnsupportedModelError(f"{type(module).__name__} attends with `{name}`, which longfit does not do")
        if kwargs.get("output_attentions"):
            raise UnsupportedFeatureError(
                "attention weights are never materialised with a compressor; ask for them inside `model.disabled()`"
            )
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        rows = [attend_bounded(m, query[r], key[r], value[r], scaling, backend) for r, m in layer.members()]
        out = rows[0] if len(rows) == 1 else torch.cat(rows)
        return out.transpose(1, 2).contiguous(), None

    return bounded_attention


def attend_bounded(
    layer: BoundedLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float, backend: str
) -> Tensor:
    """Attention of one forward over a bounded layer, then the layer's trimming.

    query [B, H, Q, D], key [B, G, Q, D], value [B, G, Q, Dv]; returns [B, H, Q, Dv].
    """
    group, step = query.shape[1] // key.shape[1], layer.step
    patch = layer.patch if layer.patch is not None and step.phase in layer.patch.phases else None
    whole = len(layer.parts) == 1 and not any(step.padding) and not any(step.trailing)
    out = None if whole else query.new_zeros(*query.shape[:3], value.shape[-1])
    looks = []
    for part in layer.parts:
        span = step.span(part.rows.start, query.shape[2])
        q = query[part.rows, part.query_heads(group), span]
        k, v = key[part.rows, part.heads, span], value[part.rows, part.heads, span]
        stored = layer.stored_keys(part)
        scores: dict[str, Tensor] = {}
        if q.shape[2] == 0:
            attended, lse = q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_zeros(q.shape[:3]).float()
        else:
            scene = Scene(
                queries=q,
                keys=k,
                values=v,
                stored_keys=stored,
                stored_values=None if stored is None or part.store is None else part.store.values,
                part=part,
                first=max(0, layer.seen - part.padding),
                first_rotary=layer.ledger.base[part.rows.start],
                scaling=scaling,
                backend=backend,
                phase=step.phase,
                layer=layer.depth[0],
                layers=layer.depth[1],
                rotate=None if layer.rotary is None else layer.rotary.rotate,
                ids=None if step.ids is None else step.ids[part.rows, span],
                again=_again(step, part.rows.start, query.device),
                probe_tokens=step.probe_tokens,
                packed=layer.ledger.packed,
            )
            attended, lse = scene.full() if patch is None else patch.attend(scene)
            scores = scene.new_scores
            if step.phase == "decode":
                layer.read_bytes += scene.read_bytes
        looks.append(Look(q, lse, stored, scores))
        if out is None:
            out = attended
        else:
            out[part.rows, part.query_heads(group), span] = attended
    layer.finish(looks, scaling)
    assert out is not None
    return out


def _again(step: Step, row: int, device: torch.device) -> Tensor | None:
    return torch.tensor(step.again[row], device=device) if step.again and step.again[row] else None


def base_function(module: nn.Module, backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that transformers would call for `backend`."""
    if backend == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[backend]

"""Cross-attention that is put into a reader for a while: the module, and the hooks that hold it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]


class CrossAttention(nn.Module):
    """Queries from hidden states, keys and values from a memory; no rotary positions, no mask. In fp32.

    Args:
        width: E of the queries and of what comes out.
        memory_width: of the memory.
        heads, groups, head_dim: H, G and D; each key and value head serves H / G query heads.
        norm_memory: whether the memory is normalised as well.
        norm: the normalisation of the queries (and of the memory).
    """

    def __init__(
        self,
        width: int,
        memory_width: int,
        heads: int,
        groups: int,
        head_dim: int,
        norm: type[nn.Module] = nn.RMSNorm,
        norm_memory: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.norm = norm(width)
        self.norm_memory = norm(memory_width) if norm_memory else nn.Identity()
        self.query = nn.Linear(width, heads * head_dim, bias=False)
        self.key = nn.Linear(memory_width, groups * head_dim, bias=False)
        self.value = nn.Linear(memory_width, groups * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, M, D] of a memory [B, M, Em]: once for as long as it is read."""
        memory = self.norm_memory(memory.float())
        split = (
            part.unflatten(-1, (self.groups, -1)).transpose(1, 2) for part in (self.key(memory), self.value(memory))
        )
        keys, values = split
        return keys, values

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[B, T, E] in fp32 from hidden states [B, T, E]; a row of keys serves B / rows rows, as beams are laid out."""
        query = self.query(self.norm(hidden.float())).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        beams = query.shape[0] // keys.shape[0]
        if beams > 1:
            keys, values = keys.repeat_interleave(beams, 0), values.repeat_interleave(beams, 0)
        out = nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=self.heads != self.groups)
        return self.out(out.transpose(1, 2).flatten(2))


def feed_forward(width: int, inner: int) -> nn.Sequential:
    """LCIRC's: layer norm, a linear map to `inner`, SiLU, and one back to `width`."""
    maps = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
    return nn.Sequential(nn.LayerNorm(width), maps[0], nn.SiLU(), maps[1])


class GatedCross(nn.Module):
    """Cross-attention and a feed-forward, each behind a tanh gate that starts closed (Flamingo, LCIRC). In fp32.

    Args:
        width: E, of hidden states and memory.
        heads, head_dim: H and D.
        inner: width of the feed-forward.
    """

    def __init__(self, width: int, heads: int, head_dim: int, inner: int) -> None:
        super().__init__()
        self.attention = CrossAttention(width, width, heads, heads, head_dim, norm=nn.LayerNorm)
        self.feed_forward = feed_forward(width, inner)
        self.attention_gate, self.forward_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Hidden states [B, T, E] that have read the memory, in the dtype they came in."""
        out = hidden.float()
        out = out + self.attention_gate.tanh() * self.attention(out, keys, values)
        return (out + self.forward_gate.tanh() * self.feed_forward(out)).to(hidden.dtype)


class Read:
    """A module that attends to one memory: keys and values are made at its first call, then kept.

    Args:
        attention: what projects the memory.
        module: what takes hidden states, keys and values; the attention itself if left out.
        memory: [B, M, Em].
    """

    def __init__(self, attention: CrossAttention, memory: Tensor, module: nn.Module | None = None) -> None:
        self.attention, self.memory, self.module = attention, memory, module or attention
        self.projected: tuple[Tensor, Tensor] | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.projected is None:
            self.projected = self.attention.project(self.memory)
        out: Tensor = self.module(hidden, *self.projected)
        return out.to(hidden.dtype)


def attention_of(layer: Any) -> nn.Module:
    """The self-attention of a decoder layer."""
    found: nn.Module = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
    return found


def _before(layer: nn.Module, change: Change) -> list[Any]:
    """Hooks by which a layer gets `change(hidden)` for its input [B, T, E]."""

    def enter(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return [layer.register_forward_pre_hook(enter, with_kwargs=True)]


def _after_attention(layer: nn.Module, added: Change) -> list[Any]:
    """Hooks by which `added(hidden)` joins the residual stream after self-attention, before the feed-forward.

    What self-attention adds to the stream gets it on top: the output of the attention, or of the norm behind it where
    the family has one (Gemma 3). In a family whose feed-forward runs beside attention (GPT-NeoX) it joins after both.
    """
    entered: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[:] = [args[0] if args else kwargs["hidden_states"]]

    def leave(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        changed = first + added(entered[0] + first)
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    behind: Any = layer
    last = behind.post_attention_layernorm if hasattr(layer, "post_feedforward_layernorm") else attention_of(layer)
    return [layer.register_forward_pre_hook(enter, with_kwargs=True), last.register_forward_hook(leave)]


PLACES = {"before": _before, "after_attention": _after_attention}


@contextmanager
def injected(layers: Sequence[nn.Module], changes: dict[int, Change], place: str) -> Iterator[None]:
    """Inside, the layers that `changes` names run with them; afterwards nothing is left on any module.

    Args:
        layers: of a decoder.
        changes: by layer: what makes the input of the layer ("before"), or what is added to the residual stream between
            self-attention and feed-forward ("after_attention"), from hidden states [B, T, E].
    """
    handles = [handle for index, change in changes.items() for handle in PLACES[place](layers[index], change)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

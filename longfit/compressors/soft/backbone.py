"""The base model as the learned methods use it: one pass through its layers, with a past, a mask and positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from longfit.cache import SLIDING, Rotary, layer_types
from longfit.compressors.soft.encoded import Entries
from longfit.errors import UnsupportedFeatureError


class _Stop(Exception):
    """Ends a pass at the layer whose input was asked for."""


@dataclass
class Pass:
    """What a pass gave.

    Attributes:
        hidden: [B, T, E] after the final norm; or what entered layer `stopped`, without it.
        entries: keys and values of the new tokens, for every layer that ran.
        stopped: where the pass ended early: the layer that has not run, and the arguments it would have had.
    """

    hidden: Tensor
    entries: tuple[Entries, ...]
    stopped: tuple[nn.Module, dict[str, Any]] | None = None


class Backbone:
    """A causal LM's embeddings, layers and head. Gradients flow through everything.

    Args:
        model: the model, wrapped or not; its own attention runs (eager or sdpa: masks are [B, 1, T, S]).

    Raises:
        UnsupportedFeatureError: its attention takes no such mask (flash-attention).
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder: Any = model.get_decoder()
        self.types, arguments = layer_types(model.config)
        self.windows: list[int | None] = [given.get("sliding_window") for given in arguments]
        backend = (model.config._attn_implementation or "eager").removeprefix("longfit_")
        if backend not in ("eager", "sdpa"):
            raise UnsupportedFeatureError(
                f"learned compressors mask freely, which attn_implementation={backend!r} cannot do; "
                'load the model with attn_implementation="sdpa"'
            )
        self.additive = backend == "eager"

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config(decoder=True)

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.decoder.layers)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def width(self) -> int:
        """E."""
        return int(self.config.hidden_size)

    def rotary(self, layer: int) -> Rotary | None:
        """What moves the keys of a layer."""
        return Rotary.of(self.decoder, self.types[layer])

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [B, T, E] of ids [B, T], scaled where the model scales them."""
        return self.model.get_input_embeddings()(ids)

    def vocabulary(self, rows: int = 4096) -> Tensor:
        """Input embeddings [N, E] of tokens evenly spread over the vocabulary, at most `rows`, as layers get them."""
        V = int(self.model.get_input_embeddings().weight.shape[0])
        with torch.no_grad():
            return self.embed(torch.arange(0, V, -(-V // rows), device=self.device)[None])[0]

    def end_embedding(self) -> Tensor | None:
        """Input embedding [E] of the end-of-text token, if the model has one."""
        end = self.config.eos_token_id
        end = end[0] if isinstance(end, list) else end
        if end is None:
            return None
        with torch.no_grad():
            return self.embed(torch.tensor([[end]], device=self.device))[0, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, T, V] from hidden states after the final norm."""
        # A slice of [B, T, E] would be multiplied row by row, with a copy of the head for each.
        logits = self.model.get_output_embeddings()(hidden.contiguous())
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if not cap else torch.tanh(logits / cap) * cap

    def run(
        self,
        embeds: Tensor,
        positions: Tensor,
        past: Sequence[Entries] | None = None,
        allowed: Tensor | None = None,
        past_bias: Tensor | None = None,
        stop_at: int | None = None,
        sees_past: Tensor | None = None,
        allowed_sliding: Tensor | None = None,
    ) -> Pass:
        """One forward.

        Args:
            embeds: [B, T, E].
            positions: [T] rotary positions.
            past: entries of every layer that come before.
            allowed: bool [T, T] or [B, T, T], which new tokens see which; causal if left out. All of the past is seen
                (in sliding layers, what lies within their window, by position).
            past_bias: [B, P] added to the attention logits of the past entries, full-attention layers only.
            stop_at: the layer at whose input to stop.
            sees_past: bool [T], which new tokens see the past; all of them if left out.
            allowed_sliding: what sliding layers use instead of `allowed` (within their window).
        """
        T = embeds.shape[1]
        cache = _cache(past)
        if allowed is None:
            allowed = torch.ones(T, T, dtype=torch.bool, device=embeds.device).tril()
        if sees_past is None:
            sees_past = torch.ones(T, dtype=torch.bool, device=embeds.device)
        masks = {}
        for kind in set(self.types):
            chosen = allowed_sliding if kind == SLIDING and allowed_sliding is not None else allowed
            masks[kind] = self._mask(self.types.index(kind), positions, past, chosen, sees_past, past_bias, embeds)
        mask: Any = masks if len(masks) > 1 else next(iter(masks.values()))
        arguments = {
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "position_ids": positions[None].expand(embeds.shape[0], -1),
            "past_key_values": cache,
            "use_cache": True,
        }
        stopped = None
        if stop_at is None:
            hidden = self.decoder(**arguments).last_hidden_state
        else:
            hidden, stopped = self._until(stop_at, arguments)
        entries = []
        for layer in cast(list[DynamicLayer], cache.layers[:stop_at]):
            assert layer.keys is not None and layer.values is not None
            new = slice(layer.keys.shape[2] - T, None)
            entries.append(Entries(layer.keys[:, :, new], layer.values[:, :, new], positions))
        return Pass(hidden, tuple(entries), stopped)

    def _until(self, stop_at: int, arguments: dict[str, Any]) -> tuple[Tensor, tuple[nn.Module, dict[str, Any]]]:
        """The input of a layer, and the keyword arguments that it was about to run with."""
        caught: dict[str, Any] = {}
        layer = self.layers[stop_at]

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught["hidden"] = args[0] if args else kwargs.pop("hidden_states")
            caught["kwargs"] = kwargs
            raise _Stop

        handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.decoder(**arguments)
        except _Stop:
            pass
        finally:
            handle.remove()
        return caught["hidden"], (layer, caught["kwargs"])

    def _mask(
        self,
        layer: int,
        positions: Tensor,
        past: Sequence[Entries] | None,
        allowed: Tensor,
        sees_past: Tensor,
        past_bias: Tensor | None,
        embeds: Tensor,
    ) -> Tensor:
        """[B or 1, 1, T, P + T] for the layers that are like `layer`: bool, or what is added to the logits."""
        new = allowed if allowed.ndim == 3 else allowed[None]
        T = new.shape[1]
        P = past[layer].keys.shape[2] if past else 0
        seen = torch.cat([sees_past[None, :, None].expand(new.shape[0], T, P), new], 2)
        window = self.windows[layer]
        if self.types[layer] == SLIDING and window is not None:
            before = past[layer].positions if past else positions[:0]
            distance = positions[:, None] - torch.cat([before, positions])[None]
            seen = seen & (distance.abs() < window)
        if past_bias is None and not self.additive:
            return seen[:, None]
        bias = torch.zeros(seen.shape, dtype=embeds.dtype, device=embeds.device)
        bias = bias.masked_fill(~seen, torch.finfo(embeds.dtype).min)
        if past_bias is not None and self.types[layer] != SLIDING:
            bias = torch.cat(
                [bias[..., :P] + past_bias[:, None].to(bias.dtype), bias[..., P:].expand(past_bias.shape[0], -1, -1)], 2
            )
        return bias[:, None]


def _cache(past: Sequence[Entries] | None) -> DynamicCache:
    """A cache that starts with the past entries; every layer keeps all, masks say what is seen."""
    cache = DynamicCache()
    for index, entries in enumerate(past or ()):
        cache.update(entries.keys, entries.values, index)
    return cache

"""Infini-attention: a local segment, and a memory of fixed size for everything before it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longfit.attention.base import AttentionPatch, Scene
from longfit.attention.compressive import TINY, Compressive
from longfit.attention.partial import attend, merge
from longfit.attention.pieces import attend_some
from longfit.attention.unrotated import angles, check_rotary, own_angles
from longfit.errors import InputError

MATRIX, NORMALIZER = "infini_matrix", "infini_normalizer"


@dataclass
class Infini(AttentionPatch):
    """Exact attention within a segment; what lies before it has been absorbed by a matrix per key/value head.

    Munkhdalai et al. 2024, "Leave No Context Behind". Segments are stretches of `segment_tokens` positions. A segment
    is absorbed when it leaves the local window, keys and queries without rotary positions, and is then dropped from
    the cache. The query heads that read one key/value head read its matrix.

    The gate that mixes what memory returns with local attention:

    - "sigmoid": the paper's, sigmoid(beta) with one beta per layer and query head. Training learns them (see
      `gate_parameters`); untrained, every head starts at a memory share of `memory_share`.
    - "mass": in proportion to the sums of similarities, sigma(q) z for memory and the sum of exponentials for local
      attention, as if both were one softmax. It needs no training and is not in the paper.

    Deviations: while nothing has been absorbed, local attention has no gate (the paper would scale it by 1 - gate, as
    a model trained so expects and another does not). `local_segments` > 1 keeps further segments before the query's
    own exact, and `sink_tokens` keeps the first tokens exact for good; 1 and 0 are the paper. Memory is not
    differentiated through from one forward to the next.

    Attributes (options):
        segment_tokens, local_segments, sink_tokens: what is exact.
        gate, memory_share: how memory is mixed in.
        delta_rule: absorb what memory does not know already; else add up.
    """

    name = "infini"
    source = "Munkhdalai et al. 2024 (Infini-attention)"
    summary = "a local segment, and a compressive memory of fixed size for all before it"
    stores = "reachable"

    segment_tokens: int = 2048
    local_segments: int = 1
    sink_tokens: int = 0
    gate: str = "sigmoid"
    memory_share: float = 0.05
    delta_rule: bool = True

    def __post_init__(self) -> None:
        self._at_least(1, segment_tokens=self.segment_tokens, local_segments=self.local_segments)
        self._at_least(0, sink_tokens=self.sink_tokens)
        if self.gate not in ("sigmoid", "mass"):
            raise InputError(f'{self.name}: gate={self.gate!r}; it is "sigmoid" or "mass"')
        if not 0.0 < self.memory_share < 1.0:
            raise InputError(f"{self.name}: memory_share has to lie between 0 and 1, got {self.memory_share}")
        self._beta: nn.Parameter | None = None

    @classmethod
    def reading(cls, read_tokens: int) -> dict[str, Any]:
        return {"segment_tokens": read_tokens + 1}

    def bind(self, model: Any) -> None:
        check_rotary(self.name, model)
        config = model.config.get_text_config(decoder=True)
        size = (config.num_hidden_layers, config.num_attention_heads)
        start = math.log(self.memory_share / (1 - self.memory_share))
        self._beta = nn.Parameter(torch.full(size, start, device=model.device))

    def gate_parameters(self) -> nn.Parameter:
        """The gates beta [layers, H] in fp32, for an optimiser or to be loaded into; the share is sigmoid(beta).

        Raises:
            InputError: no model was wrapped with this patch, or its gate is not one that learns.
        """
        if self._beta is None or self.gate != "sigmoid":
            raise InputError(
                f'{self.name}: gates are learned with gate="sigmoid" after longfit.wrap(); take them from '
                "model.longfit.patch"
            )
        return self._beta

    def learned(self) -> dict[str, Tensor]:
        return {"gates": self._beta} if self._beta is not None and self.gate == "sigmoid" else {}

    def layer_bytes(self, tokens: int, kv_heads: int, query_heads: int, key_dim: int, dtype_bytes: int) -> int:
        return 4 * kv_heads * key_dim * (key_dim + 1)

    def workspace(self, kv_heads: int, query_heads: int, key_dim: int, dtype_bytes: int, chunk: int, kept: int) -> int:
        local = min(kept + chunk, self.reach(0, 1) + chunk)
        segment = min(kept + chunk, self.segment_tokens)
        joined = 2 * (2 * kv_heads + query_heads) * local * key_dim * dtype_bytes
        return joined + 4 * key_dim * (4 * kv_heads * segment + 4 * query_heads * min(chunk, segment))

    def reach(self, layer: int, layers: int) -> int:
        return self.sink_tokens + self.segment_tokens * self.local_segments - 1

    def reachable(self, positions: Tensor, seen: int, layer: int, layers: int) -> Tensor:
        return (positions >= self.local_from(seen)) | (positions < self.sink_tokens)

    def local_from(self, position: int) -> int:
        """The first position that a query at `position` sees exactly; memory holds all before it."""
        return max(0, (position // self.segment_tokens - self.local_segments + 1) * self.segment_tokens)

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        first, Q = scene.first, scene.queries.shape[2]
        # Probes are never stored: what leaves the window on their account does so for them alone.
        kept_until = self.local_from(first + max(0, Q - scene.probe_tokens))
        done = saved_until = self.local_from(first)
        memory = saved = self._memory(scene)
        outs, lses, start = [], [], first
        while start < first + Q:
            stop = min((start // self.segment_tokens + 1) * self.segment_tokens, first + Q)
            memory, done = self._advance(scene, memory, done, self.local_from(start)), self.local_from(start)
            if done <= kept_until:
                saved, saved_until = memory, done
            out, lse = self._segment(scene, memory, start, stop)
            outs.append(out)
            lses.append(lse)
            start = stop
        saved = self._advance(scene, saved, saved_until, kept_until)
        if kept_until:
            scene.part.state[MATRIX], scene.part.state[NORMALIZER] = (t.detach() for t in saved)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def _memory(self, scene: Scene) -> Compressive:
        state = scene.part.state
        if MATRIX not in state:
            return Compressive.empty(scene.keys, scene.values)
        scene.read_bytes += state[MATRIX].nbytes + state[NORMALIZER].nbytes
        return Compressive(state[MATRIX], state[NORMALIZER])

    def _segment(self, scene: Scene, memory: Compressive, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Attention of the queries at positions start to stop, all of one segment."""
        local, lse = self._local(scene, start, stop)
        if self.local_from(start) == 0:
            return local, lse
        span = slice(start - scene.first, stop - scene.first)
        queries = scene.queries[:, :, span]
        if scene.rotate is not None:
            queries = scene.rotate(queries, -own_angles(scene)[span].expand(queries.shape[:3]))
        found, mass = memory.retrieve(queries)
        if self.gate == "mass":
            return merge(found.to(local.dtype), mass.clamp(min=TINY).log(), local, lse)
        share = self._shares(scene)[:, None] * (mass > TINY)
        mixed = torch.lerp(local.float(), found, share.unsqueeze(-1)).to(local.dtype)
        return mixed, lse - torch.log1p(-share.detach())

    def _shares(self, scene: Scene) -> Tensor:
        """Memory's share [H] in the part's query heads."""
        heads = scene.part.query_heads(scene.group)
        if self._beta is None:
            return torch.full((scene.queries.shape[1],), self.memory_share, device=scene.queries.device)
        return self._beta[scene.layer, heads].to(scene.queries.device).sigmoid()

    def _local(self, scene: Scene, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Exact attention of positions start to stop to sinks and local window, log-sum-exp included."""
        low, first = self.local_from(start), scene.first
        span = slice(start - first, stop - first)
        asking, keys, values = (t[:, :, span] for t in (scene.queries, scene.keys, scene.values))
        near = min(max(0, low - first), span.start)
        own = [slice(0, max(0, min(self.sink_tokens - first, near))), slice(near, span.start)]
        before = [(_joined(scene.keys, own), _joined(scene.values, own))]
        places = torch.cat([torch.arange(first + s.start, first + s.stop, device=keys.device) for s in own])
        places = places.expand(*keys.shape[:2], -1)
        if scene.stored_keys is not None and scene.stored_values is not None and scene.positions is not None:
            before.insert(0, (scene.stored_keys, scene.stored_values))
            places = torch.cat([scene.positions.long(), places], 2)
            scene.read_bytes += sum(t.numel() * t.element_size() for t in before[0])
        past_keys, past_values = (torch.cat(pair, 2) for pair in zip(*before, strict=True))
        seen = (places >= low) | (places < self.sink_tokens)
        if bool((seen == seen[:1, :1]).all()):
            slots = seen[0, 0].nonzero().squeeze(-1)
            past = (past_keys[:, :, slots], past_values[:, :, slots]) if slots.numel() else None
            return attend(asking, keys, values, past, scene.scaling, scene.backend)
        itself = attend(asking, keys, values, None, scene.scaling, scene.backend)
        return merge(*attend_some(asking, past_keys, past_values, seen.unsqueeze(2), scene.scaling), *itself)

    def _advance(self, scene: Scene, memory: Compressive, done: int, until: int) -> Compressive:
        """Absorb the segments between two positions, one after the other."""
        for start in range(done, until, self.segment_tokens):
            keys, values, kept = self._leaving(scene, start, start + self.segment_tokens)
            memory = memory.absorb(keys, values, self.delta_rule, kept)
        return memory

    def _leaving(self, scene: Scene, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """The entries at positions start to stop: keys without rotary positions, values, and which of them count."""
        first, real = scene.first, max(0, scene.queries.shape[2] - scene.probe_tokens)
        span = slice(max(0, start - first), max(0, min(stop - first, real)))
        keys, values = scene.keys[:, :, span], scene.values[:, :, span]
        turned = own_angles(scene)[span].expand(keys.shape[:3])
        places = torch.arange(first, first + real, device=keys.device)[span].expand(keys.shape[:3])
        store = scene.part.store
        if store is not None and store.n and start < first:
            inside = ((store.positions >= start) & (store.positions < stop)).flatten(0, 1).any(0).nonzero().squeeze(-1)
            keys = torch.cat([store.keys[:, :, inside], keys], 2)
            values = torch.cat([store.values[:, :, inside], values], 2)
            turned = torch.cat([angles(store)[:, :, inside], turned], 2)
            places = torch.cat([store.positions[:, :, inside].long(), places], 2)
        if scene.rotate is not None:
            keys = scene.rotate(keys, -turned)
        kept = (places >= start) & (places < stop) & (places >= self.sink_tokens)
        return keys, values, kept


def _joined(entries: Tensor, stretches: list[slice]) -> Tensor:
    return torch.cat([entries[:, :, stretch] for stretch in stretches], 2)

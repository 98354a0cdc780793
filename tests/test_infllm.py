"""InfLLM against its definition, token by token: what each query attends to, at which distance, and which blocks."""

from dataclasses import dataclass, field

import pytest
import torch

from longfit.attention import get
from longfit.attention.bounded import attend_bounded
from longfit.cache import BoundedLayer, Ledger, Rotary, Step
from longfit.compressors import KeepAll
from tests.tiny import tiny_model

SINKS, WINDOW, BLOCK, TOP, REPRESENTATIVES, TOGETHER = 3, 10, 4, 2, 2, 5
SCALING = 0.6


def rope(vectors: torch.Tensor, positions: torch.Tensor | int) -> torch.Tensor:
    """Su et al. 2021 with the halves layout, in float64; vectors [N, T, D] at positions [T] or all at one."""
    half = vectors.shape[-1] // 2
    at = torch.as_tensor(positions, dtype=torch.float64).reshape(-1, 1)
    angles = at * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = vectors[..., :half].double(), vectors[..., half:].double()
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@dataclass
class Reference:
    """The paper's memory for queries [H, T, D], keys [G, T, D] (both without rotation) and values [G, T, D]."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    holds: int  # stored tokens at most
    stored: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=list)
    units: list[torch.Tensor] = field(default_factory=list)  # [G, R, D] representatives of each block
    mass: dict[tuple[int, int], float] = field(default_factory=dict)
    chosen: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        places = torch.arange(self.queries.shape[1])
        self.turned, self.turned_keys = rope(self.queries, places), rope(self.keys, places)
        self.at_window = rope(self.queries, WINDOW)

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        """Attention [H, stop - start, D] of the tokens start to stop."""
        H, group = self.queries.shape[0], self.queries.shape[0] // self.keys.shape[0]
        out = torch.zeros(H, stop - start, self.values.shape[-1], dtype=torch.float64)
        for first in range(start, stop, TOGETHER):
            last = min(first + TOGETHER, stop)
            brought = [token for block in self.relevant(first, last) for token in self.blocks[block]]
            for asking in range(first, last):
                before = self.stored + list(range(start, asking + 1))
                near = [token for token in before if token > asking - WINDOW]
                far = [token for token in before if token <= asking - WINDOW] + self.tail + brought
                for head in range(H):
                    logits = [
                        self.turned_keys[head // group, near] @ self.turned[head, asking],
                        self.keys[head // group, far].double() @ self.at_window[head, asking],
                    ]
                    weights = (torch.cat(logits) * SCALING).softmax(0)
                    out[head, asking - start] = weights @ self.values[head // group, near + far].double()
                    for token, weight in zip(near, weights.tolist(), strict=False):
                        place = (head // group, token)
                        self.mass[place] = self.mass.get(place, 0.0) + weight
        self.stored += range(start, stop)
        if len(self.stored) > self.holds:
            self.release(len(self.stored) - self.holds)
        return out

    def relevant(self, first: int, last: int) -> list[int]:
        """Equation 3: the sum over queries, heads and representatives."""
        if len(self.blocks) <= TOP:
            return list(range(len(self.blocks)))
        H, group = self.queries.shape[0], self.queries.shape[0] // self.keys.shape[0]
        relevance = [
            sum(
                float(self.at_window[head, asking] @ representative.double())
                for head in range(H)
                for asking in range(first, last)
                for representative in unit[head // group]
            )
            for unit in self.units
        ]
        best = sorted(range(len(relevance)), key=lambda block: -relevance[block])[:TOP]
        self.chosen.append(best)
        return best

    def release(self, count: int) -> None:
        """The oldest tokens behind the sinks leave, and whole blocks are formed."""
        self.tail += self.stored[SINKS : SINKS + count]
        del self.stored[SINKS : SINKS + count]
        while len(self.tail) >= BLOCK:
            block, self.tail = self.tail[:BLOCK], self.tail[BLOCK:]
            self.blocks.append(block)
            best = [
                sorted(block, key=lambda token, g=g: -self.mass[(g, token)])[:REPRESENTATIVES]
                for g in range(self.keys.shape[0])
            ]
            self.units.append(torch.stack([self.keys[g, tokens] for g, tokens in enumerate(best)]))

    def make_room(self) -> None:
        """Decoding: a 64th of what is held leaves at once."""
        if len(self.stored) + 1 > self.holds:
            self.release(len(self.stored) - self.holds + max(1, self.holds // 64))


@pytest.mark.parametrize(("H", "G", "backend"), [(4, 2, "sdpa"), (3, 3, "eager"), (6, 1, "sdpa")])
def test_attention_is_the_papers(H: int, G: int, backend: str) -> None:
    torch.manual_seed(H)
    D, chunks, decoded = 8, [7, 13, 13, 13], 9
    T = sum(chunks) + decoded
    queries, keys, values = torch.randn(H, T, D), torch.randn(G, T, D), torch.randn(G, T, D)
    sizes = {"sink_tokens": SINKS, "window_tokens": WINDOW, "block_tokens": BLOCK, "query_tokens": TOGETHER}
    patch = get("infllm", **sizes, top_blocks=TOP, cached_blocks=TOP, representatives=REPRESENTATIVES)
    reference = Reference(queries, keys, values, patch.most_kept(0, 1) - patch.brought_tokens)

    ledger, step = Ledger(None, 1.0, packed=False, padding=[0], base=[0]), Step(padding=[0])
    rotary = Rotary.of(tiny_model("llama").model)
    layer = BoundedLayer(0, 1, KeepAll(), ledger, step, rotary, patch)
    places = torch.arange(T)
    turned = [rotary.rotate(t[None], places.expand(1, t.shape[0], -1)) for t in (queries, keys)]
    start = 0
    for size in [*chunks, *[1] * decoded]:
        stop = start + size
        if size == 1:
            step.phase = "decode"
            layer.make_room()
            reference.make_room()
        step.total_tokens, ledger.base = max(stop, sum(chunks)), [start]
        q, k, v = (t[..., start:stop, :] for t in (*turned, values[None]))
        layer.update(k, v)
        given = attend_bounded(layer, q, k, v, SCALING, backend)
        assert torch.allclose(given[0].double(), reference.chunk(start, stop), atol=2e-5)
        start = stop
    (part,) = layer.parts
    assert part.store.positions[0, 0].tolist() == reference.stored
    assert part.tier.pages == len(reference.blocks) > 2 * TOP
    assert part.tier.reads > TOP * G  # more than once was another block chosen
    assert len({tuple(sorted(blocks)) for blocks in reference.chosen}) > 2

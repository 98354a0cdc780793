"""How well a few numbers stand for the stored past, without training: error of the attention output.

    python recipes/attention/approximations.py --data books [--model smollm2-135m] [--tokens 4096] [--texts 2]
        [--layers 2,9,16,23,29] [--sizes 32,128,512] [--out results.json]

Queries, keys and values, as rotated, are recorded while the model reads `--tokens` tokens from the middle of each text
(`--data` is a folder of *.txt files; the first by name are taken). The last 64 tokens are a chunk that attends exactly
and causally to itself; what is before it is the past, approximated by as many slots, landmarks or kept entries as
`--sizes` says. The figure is the norm of the difference to exact attention over the norm of exact attention, all heads
and queries together, averaged over layers and texts; everything in fp32. With "+ recent" four sinks and half of the
size in recent tokens stay exact and the other half is slots. "chunk alone" has no past at all: whatever is worse does
harm. Infini-attention's memory has one size, that of a matrix in fp32: for a head of 64 channels as many bytes as 65
entries in two bytes. The model is cut behind the last layer that is looked at.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import longfit
from longfit.attention.approximate.linformer import random_projection
from longfit.attention.approximate.nystrom import nystrom_slots
from longfit.attention.compressive import TINY, Compressive
from longfit.attention.partial import attend, merge, piece, repeat
from longfit.attention.slots import attend_to_slots, segment_means
from longfit.cache.rotary import Rotary

CHUNK, SINKS, SEGMENT = 64, 4, 512
Recorded = dict[int, tuple[Tensor, Tensor, Tensor, float]]


def record(model, ids: Tensor, layers: list[int]) -> Recorded:
    """Queries, keys and values in fp32, and the factor of the dot products, of each wanted layer."""
    seen: Recorded = {}

    def recording(module, query, key, value, mask, scaling=None, **options):
        if module.layer_idx in layers:
            seen[module.layer_idx] = query.float(), key.float(), value.float(), scaling or query.shape[-1] ** -0.5
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", sdpa_mask)
    model.set_attn_implementation("recording")
    model(ids, use_cache=False, logits_to_keep=1)
    return seen


class Layer:
    """One layer's past and chunk."""

    def __init__(self, queries: Tensor, keys: Tensor, values: Tensor, scaling: float, rotary: Rotary) -> None:
        n = keys.shape[2] - CHUNK
        self.n, self.scaling, self.rotary = n, scaling, rotary
        self.all_queries, self.queries = queries, queries[:, :, n:]
        self.keys, self.values = keys[:, :, :n], values[:, :, :n]
        group = queries.shape[1] // keys.shape[1]
        own = repeat(keys[:, :, n:], group), repeat(values[:, :, n:], group)
        self.own = piece(self.queries, *own, True, scaling, "sdpa")
        self.exact = attend(self.queries, keys[:, :, n:], values[:, :, n:], (self.keys, self.values), scaling, "sdpa")[
            0
        ]

    def error(self, *pieces: tuple[Tensor, Tensor]) -> float:
        """Of the chunk and further pieces of the past, merged."""
        merged = self.own
        for one in pieces:
            merged = merge(*one, *merged)
        return float((merged[0] - self.exact).norm() / self.exact.norm())

    def kept(self, *stretches: slice) -> tuple[Tensor, Tensor]:
        """Exact attention to some of the past."""
        keys, values = (torch.cat([t[:, :, s] for s in stretches], 2) for t in (self.keys, self.values))
        group = self.queries.shape[1] // keys.shape[1]
        return piece(self.queries, repeat(keys, group), repeat(values, group), False, self.scaling, "sdpa")

    def slots(self, kind: str, size: int, stretch: slice) -> tuple[Tensor, Tensor]:
        """Attention to slots that stand for a stretch of the past."""
        keys, values = self.keys[:, :, stretch], self.values[:, :, stretch]
        if kind == "nystrom":
            asking = segment_means(self.all_queries, size)
            made = nystrom_slots(asking, keys, values, size, self.scaling, 6)
        elif kind == "linformer mean":
            made = segment_means(keys, size), segment_means(values, size)
        else:
            projection = random_projection(keys.shape[2], size, 0)
            made = projection @ keys, projection @ values
        return attend_to_slots(self.queries, *made, keys.shape[2], self.scaling)

    def infini(self, low: int, delta_rule: bool = True) -> tuple[Tensor, Tensor]:
        """What a memory of the past before `low` returns, and the logarithm of its sum of similarities."""
        places = torch.arange(self.n + CHUNK)
        bare = self.rotary.rotate(self.keys[:, :, :low], -places[:low].expand(self.keys[:, :, :low].shape[:3]))
        memory = Compressive.empty(self.keys, self.values)
        for start in range(0, low, SEGMENT):
            stop = min(start + SEGMENT, low)
            memory = memory.absorb(bare[:, :, start:stop], self.values[:, :, start:stop], delta_rule)
        asking = self.rotary.rotate(self.queries, -places[self.n :].expand(self.queries.shape[:3]))
        found, mass = memory.retrieve(asking)
        return found, mass.clamp(min=TINY).log()

    def gated(self, local: tuple[Tensor, Tensor], share: float) -> tuple[Tensor, Tensor]:
        """A piece whose part in the merge with `local` is the same for every query."""
        found, _ = self.infini(self.n - SEGMENT)
        return found, local[1] + torch.logit(torch.tensor(share))


def rows(layer: Layer, size: int) -> dict[str, float]:
    """Errors at one size."""
    n, half = layer.n, size // 2
    everything, middle = slice(0, n), slice(SINKS, n - half)
    ends = layer.kept(slice(0, SINKS), slice(n - half, n))
    kinds = ("linformer mean", "linformer random", "nystrom")
    return {
        "sliding window, 4 sinks": layer.error(layer.kept(slice(0, SINKS), slice(n - size + SINKS, n))),
        **{kind: layer.error(layer.slots(kind, size, everything)) for kind in kinds},
        "half the window alone": layer.error(ends),
        **{f"{kind} + recent": layer.error(ends, layer.slots(kind, half - SINKS, middle)) for kind in kinds},
    }


def fixed_rows(layer: Layer) -> dict[str, float]:
    """Errors of what has no size to choose. A local window of one segment and sinks is exact beside the memory."""
    window = layer.kept(slice(0, SINKS), slice(layer.n - SEGMENT, layer.n))
    local = merge(*window, *layer.own)
    group = layer.queries.shape[1] // layer.values.shape[1]
    mean = repeat(layer.values.mean(2, keepdim=True), group).expand_as(layer.exact)
    low = layer.n - SEGMENT
    return {
        "chunk alone": layer.error(),
        "mean of the values alone": float((mean - layer.exact).norm() / layer.exact.norm()),
        f"window {SEGMENT} alone": layer.error(window),
        f"window {SEGMENT} + infini, by mass": layer.error(window, layer.infini(low)),
        f"window {SEGMENT} + infini, by mass, no delta rule": layer.error(window, layer.infini(low, False)),
        **{
            f"window {SEGMENT} + infini, share {share}": layer.error(window, layer.gated(local, share))
            for share in (0.02, 0.05, 0.2)
        },
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--layers", default="2,9,16,23,29")
    parser.add_argument("--sizes", default="32,128,512")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sizes = [int(n) for n in arguments.sizes.split(",")]
    layers = [int(n) for n in arguments.layers.split(",")]
    model, tokenizer = longfit.load(arguments.model)
    rotary = Rotary.of(model.model)
    if rotary is None:
        raise SystemExit(f"{arguments.model} has no rotary positions, which this script takes out for Infini-attention")
    model.model.layers = model.model.layers[: max(layers) + 1]
    model.config.num_hidden_layers = max(layers) + 1
    errors: dict[str, dict[str, list[float]]] = {}
    for file in sorted(arguments.data.glob("*.txt"))[: arguments.texts]:
        text = file.read_text(errors="ignore")
        middle = text[len(text) // 2 :][: 8 * arguments.tokens]
        ids = tokenizer(middle, return_tensors="pt").input_ids[:, : arguments.tokens]
        for number, (*qkv, scaling) in record(model, ids, layers).items():
            layer = Layer(*qkv, scaling, rotary)
            found = {"any": fixed_rows(layer), **{str(size): rows(layer, size) for size in sizes}}
            for column, named in found.items():
                for label, error in named.items():
                    errors.setdefault(label, {}).setdefault(column, []).append(error)
            print(f"{file.name}, layer {number}: done", flush=True)
        report(errors, sizes, arguments)


def report(errors: dict[str, dict[str, list[float]]], sizes: list[int], arguments: argparse.Namespace) -> None:
    """Print the table of all texts so far, and write it where asked to."""
    means = {label: {c: round(sum(e) / len(e), 3) for c, e in by.items()} for label, by in errors.items()}
    print(f"\n| relative output error | any size | {' | '.join(map(str, sizes))} |")
    print("|---|" + "--:|" * (len(sizes) + 1))
    for label, by in means.items():
        cells = [f"{by[c]:.3f}" if c in by else "" for c in ("any", *map(str, sizes))]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)
    if arguments.out:
        written = {"arguments": vars(arguments), "mean": means, "errors": errors}
        arguments.out.write_text(json.dumps(written, default=str, indent=1))


if __name__ == "__main__":
    main()

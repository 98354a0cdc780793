"""Block-sparse prefill against full causal attention: seconds, and attention mass kept.

    OMP_NUM_THREADS=1 python recipes/bench/block_sparse.py --data books [--tokens 4096,8192,16384] [--repeats 3]
        [--layers 2,9,16,23,29] [--chunk 2048] [--model smollm2-135m] [--out results.json]

`--data` is a folder of text files; the first that is long enough is read once, and real queries, keys and values of
the chosen layers are taken down. Then attention alone is timed, without the rest of the model: chunk by chunk as the
prefill loop calls it, every patch and full attention in turn. A figure is the fewest CPU seconds of the repeats,
summed over layers, and relative to full attention in the same run. "full" is the chunked call; "one call" is one
causal kernel call over the whole input, what a model without longfit makes. Attention mass is exact, from the two
log-sum-exps, as the mean over queries of the second half, heads and layers. Inputs past the model's window (8,192 for
SmolLM2) are read all the same: seconds hold there, the mass is that of a model out of its depth.
The model is cut behind the last layer that is looked at.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import longfit
from longfit.attention.base import AttentionPatch, Scene
from longfit.attention.partial import piece, repeat
from longfit.cache import Part, Store

PATCHES: dict[str, tuple[str, dict]] = {
    "sliding_window 1024": ("sliding_window", {"window_tokens": 1024}),
    "a_shape 64+1024": ("block_sparse", {"pattern": "a_shape"}),
    "vertical_slash 64+128": (
        "block_sparse",
        {"pattern": "vertical_slash", "vertical_tokens": 64, "slash_tokens": 128},
    ),
    "vertical_slash 256+128": (
        "block_sparse",
        {"pattern": "vertical_slash", "vertical_tokens": 256, "slash_tokens": 128},
    ),
    "vertical_slash 256+512": (
        "block_sparse",
        {"pattern": "vertical_slash", "vertical_tokens": 256, "slash_tokens": 512},
    ),
    "block_topk 8 mean": ("block_sparse", {"pattern": "block_topk", "top_blocks": 8, "estimate": "mean"}),
    "block_topk 16 mean": ("block_sparse", {"pattern": "block_topk", "estimate": "mean"}),
    "block_topk 8 antidiagonal": ("block_sparse", {"pattern": "block_topk", "top_blocks": 8}),
    "block_topk 16 antidiagonal": ("block_sparse", {"pattern": "block_topk", "top_blocks": 16}),
    "block_topk 32 antidiagonal": ("block_sparse", {"pattern": "block_topk", "top_blocks": 32}),
    "block_topk 8x128 antidiagonal": (
        "block_sparse",
        {"pattern": "block_topk", "block_tokens": 128, "top_blocks": 8},
    ),
    "block_topk 16x128 antidiagonal": (
        "block_sparse",
        {"pattern": "block_topk", "block_tokens": 128, "top_blocks": 16},
    ),
}


@dataclass
class Recorder(AttentionPatch):
    """Full attention that takes queries, keys and values down."""

    phases = ("prefill",)

    wanted: tuple[int, ...] = ()
    taken: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        if scene.layer in self.wanted:
            self.taken.setdefault(scene.layer, []).append((scene.queries, scene.keys, scene.values))
        return scene.full()


def recorded(model_name: str, data: Path, tokens: int, layers: tuple[int, ...]) -> tuple[dict, float]:
    """Queries, keys and values of each wanted layer over a text, and the factor of the dot products."""
    model, tokenizer = longfit.load(model_name, dtype="bfloat16")
    for file in sorted(p for p in data.rglob("*") if p.is_file()):
        ids = tokenizer(file.read_text(errors="ignore")[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens]
        if ids.shape[1] == tokens:
            break
    else:
        raise SystemExit(f"no file under {data} has {tokens} tokens")
    model.model.layers = model.model.layers[: max(layers) + 1]
    model.config.num_hidden_layers = max(layers) + 1
    recorder = Recorder(layers)
    longfit.wrap(model, attention=recorder, chunk_tokens=1024, geometry="original")
    recorder = model.longfit.patch
    model.compress(ids)
    joined = {
        layer: tuple(torch.cat(t, 2) for t in zip(*chunks, strict=True)) for layer, chunks in recorder.taken.items()
    }
    return joined, model.config.head_dim**-0.5


def scenes(qkv: tuple[Tensor, Tensor, Tensor], tokens: int, chunk: int, scaling: float) -> list[Scene]:
    """The scenes of a prefill in chunks."""
    q, k, v = (t[:, :, :tokens] for t in qkv)
    found = []
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        store = Store(k, v, start)
        store.append(k[:, :, :start], v[:, :, :start], torch.arange(start, dtype=torch.int32), {}, start)
        found.append(
            Scene(
                queries=q[:, :, start:stop],
                keys=k[:, :, start:stop],
                values=v[:, :, start:stop],
                stored_keys=store.keys if start else None,
                stored_values=store.values if start else None,
                part=Part(slice(0, 1), slice(0, k.shape[1]), 0, store),
                first=start,
                first_rotary=start,
                scaling=scaling,
                backend="sdpa",
                phase="prefill",
                layer=0,
                layers=1,
            )
        )
    return found


def timed(work) -> tuple[float, object]:
    """CPU seconds of this process: on one thread the same as the clock's, and right on a busy machine too."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def measure(kept: dict, tokens: int, chunk: int, repeats: int, scaling: float) -> dict[str, dict[str, float]]:
    """Seconds over all layers and attention mass, by patch."""
    patches = {label: longfit.attention.get(name, **options) for label, (name, options) in PATCHES.items()}
    seconds = dict.fromkeys(["one call", "full", *patches], 0.0)
    mass = dict.fromkeys(patches, 0.0)
    for qkv in kept.values():
        q, k, v = (t[:, :, :tokens] for t in qkv)
        group = q.shape[1] // k.shape[1]
        chunks = scenes(qkv, tokens, chunk, scaling)
        works = {
            "one call": lambda q=q, k=k, v=v, group=group: [
                piece(q, repeat(k, group), repeat(v, group), True, scaling, "sdpa")
            ],
            "full": lambda chunks=chunks: [scene.full() for scene in chunks],
            **{
                label: lambda chunks=chunks, patch=patch: [patch.attend(scene) for scene in chunks]
                for label, patch in patches.items()
            },
        }
        best = dict.fromkeys(works, float("inf"))
        lse = {}
        for _ in range(repeats):
            for label, work in works.items():
                took, given = timed(work)
                best[label] = min(best[label], took)
                lse[label] = torch.cat([one[1] for one in given], 2)[:, :, tokens // 2 :]
        for label in works:
            seconds[label] += best[label]
        for label in patches:
            mass[label] += float((lse[label] - lse["full"]).exp().clamp(max=1).mean()) / len(kept)
    return {
        label: {
            "seconds": round(seconds[label], 3),
            "of_full": round(seconds[label] / seconds["full"], 3),
            "mass": round(mass.get(label, 1.0), 4),
        }
        for label in seconds
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", default="4096,8192,16384")
    parser.add_argument("--layers", default="2,9,16,23,29")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sizes = [int(n) for n in arguments.tokens.split(",")]
    layers = tuple(int(n) for n in arguments.layers.split(","))
    kept, scaling = recorded(arguments.model, arguments.data, max(sizes), layers)
    results = {}
    for tokens in sizes:
        results[tokens] = measure(kept, tokens, arguments.chunk, arguments.repeats, scaling)
        print(f"\n{tokens} tokens, {torch.get_num_threads()} thread(s), chunks of {arguments.chunk}")
        print(f"{'':32}{'seconds':>9}{'of full':>9}{'mass':>8}")
        for label, row in results[tokens].items():
            print(f"{label:32}{row['seconds']:9.3f}{row['of_full']:9.2f}{row['mass']:8.3f}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"arguments": vars(arguments), "results": results}, default=str, indent=1))


if __name__ == "__main__":
    main()

"""How much of the true attention each decode selector finds, by budget, layer and model.

    python recipes/attention/selector_recall.py --data TEXTS [--models smollm2-135m,gemma-3-270m] [--texts 6] \
        [--tokens 4096] [--queries 64] [--every 1] [--layers all] [--budgets 64,128,256,512] [-o FOLDER]

Queries, keys and values, as rotated, are recorded in every full-attention layer while the model reads `--tokens` tokens
from the middle of each text (`--data` holds *.txt files; the first `--texts` by name are taken). Then the last
`--queries` tokens (every `--every`-th of them) are decoded again, layer by layer, with the selectors that
`longfit.wrap(model, attention=...)` uses: their indexes are built from the tokens before and extended token by token.
Everything is computed in fp32 from what was recorded; layers that a selector leaves full by default are left out.

Written to the folder: `samples.csv`, one line for each text, layer, selector and budget (attention mass on what was
chosen and on the token itself; error of the output relative to full attention; bytes of a step with keys and values of
2 bytes); what is there already is not measured again. From it: `summary.json`, `table.md`, `layers.csv`, `recall.png`.
Intervals are 95 % bootstraps over texts.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from selector_report import report
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import longfit
from longfit.attention import get
from longfit.attention.base import Scene
from longfit.attention.select import SelectingPatch, attend_selected
from longfit.cache import Part
from longfit.cache.store import Store

FIELDS = ("model", "text", "layer", "selector", "budget", "mass", "error", "read_bytes", "full_bytes")
SINKS = 4
Recorded = dict[int, tuple[Tensor, Tensor, Tensor, float]]


def selectors(budget: int) -> dict[str, SelectingPatch]:
    """What is compared at a budget of so many tokens a step, by label."""
    named = {
        "exact top-k (oracle)": get("topk", top_tokens=budget),
        "hadamard_topk (ours)": get("hadamard_topk", top_tokens=budget),
        "adamas, calibrated": get("adamas", top_tokens=budget, thresholds="calibrated"),
        "adamas, as published": get("adamas", top_tokens=budget),
        "quest": get("quest", top_tokens=budget),
        # The floor: nothing is left to choose.
        "sinks and recent": get("topk", top_tokens=budget, sink_tokens=SINKS, recent_tokens=budget - SINKS),
    }
    return {label: patch for label, patch in named.items() if isinstance(patch, SelectingPatch)}


def record(model: PreTrainedModel, ids: Tensor, queries: int) -> Recorded:
    """The last queries [1, H, queries, D], all keys and values, and the scaling, by full-attention layer."""
    seen: Recorded = {}

    def recording(module, query, key, value, mask, scaling=None, **options):
        if not options.get("sliding_window"):
            factor = query.shape[-1] ** -0.5 if scaling is None else scaling
            seen[module.layer_idx] = query[:, :, -queries:].clone(), key.clone(), value.clone(), factor
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", sdpa_mask)
    model.set_attn_implementation("recording")
    model(ids, logits_to_keep=1)
    return seen


def decoded(recorded: tuple[Tensor, Tensor, Tensor, float], depth: tuple[int, int], every: int) -> Iterator[Scene]:
    """The last tokens of one layer as scenes of decoding, each with what came before it stored."""
    queries, keys, values, scaling = (t.float() if isinstance(t, Tensor) else t for t in recorded)
    asked, n = queries.shape[2], keys.shape[2]
    store = Store(keys, values, n)
    part = Part(slice(0, 1), slice(0, keys.shape[1]), padding=0, store=store)
    places = torch.arange(n, dtype=torch.int32)
    store.append(keys[:, :, : n - asked], values[:, :, : n - asked], places[: n - asked], {}, n)
    for at in range(n - asked, n):
        own = slice(at, at + 1)
        if (n - 1 - at) % every == 0:
            query = queries[:, :, at - n + asked : at - n + asked + 1]
            new = keys[:, :, own], values[:, :, own]
            yield Scene(
                query, *new, store.keys, store.values, part, at, at, scaling, "sdpa", "decode", depth[0], depth[1]
            )
        store.append(keys[:, :, own], values[:, :, own], places[own], {}, n)


def measure_layer(scenes: Iterator[Scene], budgets: list[int]) -> Iterator[dict]:
    """One row for each selector and budget, averaged over queries and heads."""
    sums: dict[tuple[str, int], list[float]] = {}
    steps = full_bytes = 0
    indexes: dict[str, object] = {}
    for scene in scenes:
        steps += 1
        scene.read_bytes = 0
        full, lse = scene.full()
        full_bytes += scene.read_bytes // 2  # recorded values are taken in fp32 here and stored in two bytes
        B, H, _, D = scene.queries.shape
        packed = scene.queries.reshape(B, scene.keys.shape[1], -1, D)
        own = (packed @ scene.keys.mT * scene.scaling).reshape(B, H, 1)
        chances = ((packed @ scene.stored_keys.mT).reshape(B, H, -1) * scene.scaling - lse).exp()
        for label, patch in selectors(max(budgets)).items():
            scene.part.index, scene.read_bytes = indexes.get(label), 0
            estimate = patch.estimate(scene)
            indexes[label] = scene.part.index
            element = 1 if label.startswith(("hadamard", "adamas")) else 2  # codes are bytes in any dtype
            index_bytes = 0 if label.startswith("sinks") else scene.read_bytes // element
            for budget in budgets:
                chooser = selectors(budget)[label]
                chooser.estimate = lambda _, scores=estimate: scores.clone()  # one scan serves all budgets
                slots = chooser.choose(scene)
                scene.read_bytes = 0
                out, _ = attend_selected(scene, slots)
                mass = chances.gather(2, slots.repeat_interleave(H // slots.shape[1], 1)).sum(-1, keepdim=True)
                mass = (mass + (own - lse).exp()).mean().item()
                error = ((out - full).norm(dim=-1) / full.norm(dim=-1)).mean().item()
                row = sums.setdefault((label, budget), [0.0, 0.0, 0.0])
                for i, value in enumerate((mass, error, index_bytes + scene.read_bytes // 2)):
                    row[i] += value
    for (label, budget), (mass, error, read) in sums.items():
        figures = {"mass": mass / steps, "error": error / steps, "read_bytes": round(read / steps)}
        yield {"selector": label, "budget": budget, **figures, "full_bytes": round(full_bytes / steps)}


def measured_already(file: Path) -> set[tuple[str, str]]:
    if not file.is_file():
        return set()
    with file.open() as lines:
        return {(row["model"], row["text"]) for row in csv.DictReader(lines)}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of *.txt files")
    parser.add_argument("--models", default="smollm2-135m,gemma-3-270m")
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--layers", default="all", help="all, or numbers with commas")
    parser.add_argument("--budgets", default="64,128,256,512")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/attention/selectors"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    budgets = [int(budget) for budget in options.budgets.split(",")]
    texts = sorted(options.data.glob("*.txt"))[: options.texts]
    if not texts:
        parser.error(f"no *.txt files in {options.data}")
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "samples.csv"
    done = measured_already(file)
    for name in options.models.split(","):
        if all((name, text.stem) in done for text in texts):
            continue
        model, tokenizer = longfit.load(name)
        layers = model.config.num_hidden_layers
        for text in texts:
            if (name, text.stem) in done:
                continue
            started = time.perf_counter()
            written = text.read_text(encoding="utf-8")
            ids = tokenizer(written[len(written) // 3 :][: 8 * options.tokens], return_tensors="pt").input_ids
            recorded = record(model, ids[:, : options.tokens], options.queries)
            rows = []
            for layer in sorted(recorded):
                wanted = options.layers == "all" or layer in {int(i) for i in options.layers.split(",")}
                if wanted and layer >= SelectingPatch.dense_layers:
                    scenes = decoded(recorded[layer], (layer, layers), options.every)
                    for row in measure_layer(scenes, budgets):
                        rows.append({"model": name, "text": text.stem, "layer": layer, **row})
            fresh = not file.is_file()
            with file.open("a", newline="") as out:
                writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
                if fresh:
                    writer.writeheader()
                writer.writerows(rows)
            print(f"{name} {text.stem}: {time.perf_counter() - started:.0f} s", flush=True)
    measured = ("tokens", "queries", "every", "layers", "threads")  # models and texts: as many as the samples have
    how = {key: getattr(options, key) for key in measured}
    report(file, options.output, {**how, "torch": torch.__version__, "machine": platform.machine()})


if __name__ == "__main__":
    main()

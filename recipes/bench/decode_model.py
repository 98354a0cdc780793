"""Whole decode steps of a model with a long cache: transformers' full attention, ours, and the selectors, in turn.

    python recipes/bench/decode_model.py [--model smollm2-135m] [--tokens 4096,16384,32768] [--budget 128] \
        [--selectors hadamard_topk,quest,topk] [--threads 1] [--turns 9] [-o OUTPUT.json]

The cache holds the keys and values of the first 1,024 tokens of a text, repeated up to the length: what they say does
not matter to the time, that a selector finds keys of a real distribution may. A step is one token through the whole
model, lm_head included. All contenders take turns in one process, the figure of each is its fastest turn (the first is
not timed: the selectors build their index in it), and what counts is the ratio to `transformers` in the same run: sdpa
over a DynamicCache. With one thread it is the processor's time that is taken.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode_attention import fastest
from transformers import DynamicCache

import longfit
from longfit.cache import FitCache

TEXT = Path(__file__).parents[2] / "longfit" / "bench" / "prompt.txt"
READ = 1024


def long_cache(model: Any, ids: torch.Tensor, tokens: int, attention: Any) -> FitCache:
    """A cache of `tokens` entries a layer, the first READ of them read and the rest a repetition."""
    wrapped = longfit.wrap(model, "knorm", budget="100%", attention=attention, chunk_tokens=READ)
    cache: FitCache = wrapped.compress(ids).cache.fork()
    for layer in cache.bounded:
        (part,) = layer.parts
        store, copies = part.store, tokens // READ - 1
        places = torch.arange(READ, tokens, dtype=torch.int32)
        keys, values = (t.clone().repeat(1, 1, copies, 1) for t in (store.keys, store.values))
        store.resize(tokens + 64)
        store.append(keys, values, places, {}, tokens + 64)
        layer.seen = tokens
    longfit.unwrap(model)
    return cache


def plain_cache(cache: FitCache) -> DynamicCache:
    """The same entries as transformers keeps them."""
    plain = DynamicCache()
    for place, layer in enumerate(cache.bounded):
        store = layer.parts[0].store
        plain.update(store.keys.clone(), store.values.clone(), place)
    return plain


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="one without sliding layers")
    parser.add_argument("--tokens", default="4096,16384,32768")
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--selectors", default="hadamard_topk,quest,topk")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = longfit.load(options.model, dtype=options.dtype)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    ids = ids.repeat(1, -(-READ // ids.shape[1]))[:, :READ]
    runs, lines = [], ["| stored tokens | attention | ms a step | of transformers |", "|--:|---|--:|--:|"]
    for tokens in (int(n) // READ * READ for n in options.tokens.split(",")):
        caches = {"longfit, full": long_cache(model, ids, tokens, None)}
        for name in options.selectors.split(","):
            patch = longfit.attention.get(name, top_tokens=options.budget)
            caches[f"{name}, {options.budget}"] = long_cache(model, ids, tokens, patch)
        plain, token = plain_cache(caches["longfit, full"]), ids[:, :1]
        wrapped = longfit.wrap(model, "knorm", budget="100%")  # any: the caches bring their own

        def step(cache: FitCache, wrapped: Any = wrapped, token: torch.Tensor = token) -> None:
            wrapped(token, past_key_values=cache, use_cache=True)

        def plain_step(plain: DynamicCache = plain, wrapped: Any = wrapped, token: torch.Tensor = token) -> None:
            with wrapped.disabled():
                wrapped(token, past_key_values=plain, use_cache=True)

        contenders: dict[str, Callable[[], object]] = {"transformers": plain_step}
        contenders |= {name: lambda cache=cache: step(cache) for name, cache in caches.items()}
        taken = fastest(contenders, options.turns)
        longfit.unwrap(model)
        for name, ms in taken.items():
            ratio = ms / taken["transformers"]
            runs.append({"tokens": tokens, "what": name, "ms": ms, "of_transformers": ratio})
            lines.append(f"| {tokens:,} | {name} | {ms:.1f} | {ratio:.3f} |")
    print(f"{options.model}, {options.dtype}, {options.threads} thread(s), torch {torch.__version__}\n")
    print("\n".join(lines))
    if options.output:
        how = {key: value for key, value in vars(options).items() if key != "output"}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"how": how, "torch": torch.__version__, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Attention of one decoded token alone: full attention against the sparse selectors, on this CPU.

    python recipes/bench/decode_attention.py [--keys 4096,16384,65536] [--budgets 128,1024] [--heads 9/3] \
        [--head-size 64] [--dtypes bfloat16,float32] [--threads 1] [--turns 9] [-o OUTPUT.json]

Random keys and values of one layer; every step stores a token, brings the index up to date and attends. All contenders
take turns in one process, the figure of each is its fastest turn, and what counts is the ratio to full attention in
the same run (packed query rows and one softmax, the fastest full path of this package: no keys are repeated). With one
thread it is the processor's time that is taken: on a shared machine the clock on the wall counts others' turns against
whatever takes longest. A second table times the two passes of a selector apart, scoring all keys and choosing the
highest, in plain torch and compiled.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from longfit.attention import code_scan, get, kernels
from longfit.attention.base import AttentionPatch, Scene
from longfit.cache import Part
from longfit.cache.products import dot_products
from longfit.cache.store import Store

LEVELS = (-1.5104, -0.4528, 0.4528, 1.5104)
SELECTORS = ("topk", "quest", "adamas", "hadamard_topk")


class Layer:
    """One layer's store, its own index, and steps of decoding by one patch (None: full attention)."""

    def __init__(self, keys: Tensor, values: Tensor, heads: int, patch: AttentionPatch | None, room: int) -> None:
        n = keys.shape[2]
        self.patch, self.heads = patch, heads
        self.store = Store(keys, values, n + room)
        self.store.append(keys, values, torch.arange(n, dtype=torch.int32), {}, n)
        self.part = Part(slice(0, 1), slice(0, keys.shape[1]), 0, self.store)
        self.read_bytes = 0

    def step(self) -> None:
        store = self.store
        B, G, n, D = store.keys.shape
        query, key, value = (torch.randn(B, heads, 1, D).to(store.keys.dtype) for heads in (self.heads, G, G))
        scene = Scene(query, key, value, store.keys, store.values, self.part, n, n, D**-0.5, "sdpa", "decode", 9, 30)
        scene.full() if self.patch is None else self.patch.attend(scene)
        self.read_bytes = scene.read_bytes
        store.append(key, value, torch.tensor([n], dtype=torch.int32), {}, n)


def fastest(contenders: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Milliseconds of each contender's fastest turn; the first turn of each is not timed."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(turns + 1):
        for name, work in contenders.items():
            started = clock()
            work()
            if turn:
                best[name] = min(best[name], (clock() - started) * 1e3)
    return best


def passes(keys: Tensor, heads: int, budget: int) -> dict[str, Callable[[], object]]:
    """The two passes of a selector, each by itself."""
    _, G, n, D = keys.shape
    queries = torch.randn(1, G, heads // G, D).to(keys.dtype)
    codes = torch.randint(0, 256, (1, G, n, D // 4), dtype=torch.uint8)
    eighths = torch.randint(-2, 2, (G, n, D), dtype=torch.int8)
    small = torch.randint(-127, 127, (G, D, 8), dtype=torch.int8)
    scores = torch.randn(1, heads, n)
    return {
        "exact scores": lambda: dot_products(queries, keys),
        "int8 copy, torch._int_mm": lambda: [torch._int_mm(eighths[g], small[g]) for g in range(G)],
        "2-bit codes, plain torch": lambda: code_scan.code_products(queries, codes, LEVELS),
        "2-bit codes, compiled": lambda: kernels.code_products(queries, codes, LEVELS),
        f"torch.topk({budget})": lambda: scores.topk(budget, sorted=False),
        f"top {budget}, compiled": lambda: kernels.select_top(scores, budget),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", default="4096,16384,65536")
    parser.add_argument("--budgets", default="128,1024")
    parser.add_argument("--heads", default="9/3", help="query heads / key-value heads")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    H, G = (int(heads) for heads in options.heads.split("/"))
    D, budgets = options.head_size, [int(budget) for budget in options.budgets.split(",")]
    runs = []
    whole = ["| keys | dtype | attention | ms | of full | bytes read of full |", "|---|---|---|---|---|---|"]
    apart = ["| keys | dtype | pass | ms | of exact scores |", "|---|---|---|---|---|"]
    for n in (int(n) for n in options.keys.split(",")):
        for dtype in options.dtypes.split(","):
            keys, values = (torch.randn(1, G, n, D).to(getattr(torch, dtype)) for _ in range(2))
            layers = {"full": Layer(keys, values, H, None, options.turns + 1)}
            for budget in budgets:
                for name in SELECTORS:
                    patch = get(name, top_tokens=budget)
                    layers[f"{name}, {budget}"] = Layer(keys, values, H, patch, options.turns + 1)
            taken = fastest({name: layer.step for name, layer in layers.items()}, options.turns)
            for name, ms in taken.items():
                ratio, read = ms / taken["full"], layers[name].read_bytes / layers["full"].read_bytes
                runs.append({"keys": n, "dtype": dtype, "what": name, "ms": ms, "of_full": ratio, "read_of_full": read})
                whole.append(f"| {n} | {dtype} | {name} | {ms:.3f} | {ratio:.3f} | {read:.1%} |")
            del layers
            for name, ms in (parts := fastest(passes(keys, H, budgets[-1]), options.turns)).items():
                runs.append({"keys": n, "dtype": dtype, "what": name, "ms": ms})
                apart.append(f"| {n} | {dtype} | {name} | {ms:.3f} | {ms / parts['exact scores']:.2f} |")
    print(f"{H}/{G} heads of {D}, {options.threads} thread(s), torch {torch.__version__}\n")
    print("\n".join([*whole, "", *apart]))
    if options.output:
        how = {key: value for key, value in vars(options).items() if key != "output"}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"how": how, "torch": torch.__version__, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()

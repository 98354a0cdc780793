"""Sparse decoding on a GPU: the kernels, one attention step, and a model end to end.

    python recipes/bench/sparse_gpu.py -o docs/attention/gpu [--parts copy,kernels,step,model]
    python recipes/bench/sparse_gpu.py --rehearse -o /tmp/rehearsal     # small sizes on a CPU: does the script run?

The shapes are those of an 8B Llama: 32 query heads, 8 key/value heads, d 128, bf16. `kernels` gives microseconds and
bytes per second of each kernel beside the copy bandwidth of the same card; bytes are those that have to be moved once,
codes and written scores for the scan. `step` compares scan, selection and gathered attention together with full
attention by PyTorch's flash kernel and by what sdpa chooses. `model` decodes with a Llama of random weights: plain
transformers, then every selector, with kernels and without. Kernels and steps are captured in CUDA graphs, so that
device time is timed and not Python, and timed outside one too; the L2 cache is overwritten before each run. Each part
writes one JSON file with the card, the versions and every single time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

import longfit
from longfit.attention import available, get, kernels
from longfit.attention.kernels.dispatch import VARIABLE

H, G, D = 32, 8, 128
LEVELS = (-1.5104, -0.4528, 0.4528, 1.5104)
SELECTORS = ("adamas", "hadamard_topk")


@dataclass
class Bench:
    device: str
    repeats: int
    flush: Tensor  # larger than the L2 cache

    def times(self, work: Callable[[], Any], graph: bool = True) -> dict[str, list[float]]:
        """Microseconds of every repeat: `graph` on the device alone, `eager` as Python launches it."""
        for _ in range(3):
            work()
        if self.device == "cpu":
            return {"eager": [self._wall(work) for _ in range(self.repeats)]}
        found = {"eager": [self._events(work) for _ in range(self.repeats)]}
        if graph:
            torch.cuda.synchronize()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                work()
            found["graph"] = [self._events(captured.replay) for _ in range(self.repeats)]
        return found

    def _wall(self, work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e6

    def _events(self, work: Callable[[], Any]) -> float:
        self.flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def best(times: dict[str, list[float]]) -> float:
    return statistics.median(times.get("graph", times["eager"]))


def copies(bench: Bench, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The bandwidth of a copy: bytes read and bytes written."""
    for size in options.copy_bytes:
        source = torch.ones(size, dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)
        yield {"what": "copy", "bytes": 2 * size, "us": bench.times(lambda s=source, t=target: t.copy_(s))}


def single_kernels(bench: Bench, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each kernel by itself."""
    for batch, S in ((b, s) for b in options.batches for s in options.lengths):
        shape = {"batch": batch, "keys": S}
        inputs = Inputs(bench.device, options.dtype, batch, S)
        scanned = inputs.codes.nbytes + batch * H * S * 4
        for what, work in (("scan adamas", inputs.nearness), ("scan hadamard_topk", inputs.products)):
            yield {**shape, "what": what, "bytes": scanned, "us": bench.times(work)}
        scores = inputs.products().reshape(batch, H, S)
        for k in options.budgets:
            if k >= S:
                continue
            read = {**shape, "k": k, "bytes": scores.nbytes}
            yield {**read, "what": "top-k", "us": bench.times(lambda s=scores, k=k: kernels.select_top(s, k))}
            work = lambda s=scores, k=k: s.topk(k, sorted=False)  # noqa: E731
            yield {**read, "what": "torch.topk", "us": bench.times(work)}
            for chosen in (H, G):
                slots = scores[:, :chosen].topk(k).indices.int()
                moved = batch * chosen * k * 2 * D * inputs.keys.element_size()
                what = f"attend, {'each head its own' if chosen == H else 'a group together'}"
                us = bench.times(lambda i=inputs, slots=slots: i.attend(slots))
                yield {**shape, "k": k, "what": what, "bytes": moved, "us": us}


def steps(bench: Bench, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Attention of one new token: scan, selection and gathered attention together, and full attention."""
    for batch, S in ((b, s) for b in options.batches for s in options.lengths):
        shape = {"batch": batch, "keys": S}
        inputs = Inputs(bench.device, options.dtype, batch, S)
        full_bytes = inputs.keys.nbytes + inputs.values.nbytes
        yield {**shape, "what": "full, sdpa", "bytes": full_bytes, "us": bench.times(inputs.full)}
        if bench.device != "cpu":
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                flash = bench.times(inputs.full)
            yield {**shape, "what": "full, flash", "bytes": full_bytes, "us": flash}
        for k in options.budgets:
            if k >= S:
                continue
            moved = inputs.codes.nbytes + batch * H * k * 2 * D * inputs.keys.element_size()
            for name, scan in (("adamas", inputs.nearness), ("hadamard_topk", inputs.products)):
                us = bench.times(lambda i=inputs, scan=scan, k=k: i.step(scan, k))
                yield {**shape, "k": k, "what": f"step, {name}", "bytes": moved, "us": us}


class Inputs:
    """Random keys, values, codes and one query a head."""

    def __init__(self, device: str, dtype: torch.dtype, batch: int, S: int) -> None:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=device, dtype=dtype)

        self.keys, self.values = normal(batch, G, S, D), normal(batch, G, S, D)
        self.queries, self.own = normal(batch, H, 1, D), (normal(batch, G, 1, D), normal(batch, G, 1, D))
        self.codes = torch.randint(0, 256, (batch, G, S, D // 4), dtype=torch.uint8, device=device)
        self.query_codes = torch.randint(0, 256, (batch, G, H // G, D // 4), dtype=torch.uint8, device=device)
        self.rows = self.queries.float().view(batch, G, H // G, D)

    def nearness(self) -> Tensor:
        return kernels.code_nearness(self.query_codes, self.codes)

    def products(self) -> Tensor:
        return kernels.code_products(self.rows, self.codes, LEVELS)

    def attend(self, slots: Tensor) -> Tensor:
        return kernels.attend_slots(self.queries, *self.own, (self.keys, self.values), slots, D**-0.5)[0]

    def step(self, scan: Callable[[], Tensor], k: int) -> Tensor:
        return self.attend(kernels.select_top(scan().flatten(1, 2), k))

    def full(self) -> Tensor:
        return scaled_dot_product_attention(self.queries, self.keys, self.values, enable_gqa=True)


def whole_model(bench: Bench, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Decoding after a long prompt, milliseconds a token: plain transformers, then the selectors."""
    torch.manual_seed(0)
    config = LlamaConfig(**options.model, max_position_embeddings=2 * max(options.model_lengths), attention_bias=False)
    with torch.device(bench.device):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(options.dtype)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(previous)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    for S in options.model_lengths:
        ids = torch.randint(config.vocab_size, (1, S), device=bench.device)
        yield {"what": "plain sdpa", "keys": S, **decode(model, ids, options.new_tokens)}
        for name in SELECTORS:
            if name not in available():
                print(f"no attention is called {name} in this version: left out", file=sys.stderr)
                continue
            for k in (k for k in options.budgets if k < S):
                fitted = longfit.wrap(model, attention=get(name, top_tokens=k))
                for allowed in ("scan,top,attend", "scan,attend", "plain"):
                    os.environ[VARIABLE] = allowed
                    cell = {"what": name, "keys": S, "k": k, "kernels": allowed}
                    yield {**cell, **decode(fitted, ids, options.new_tokens)}
                os.environ.pop(VARIABLE)
                model = longfit.unwrap(fitted)


class Clock:
    """A logits processor that notes when each token's logits are really there."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter())
        return scores


@torch.inference_mode()
def decode(model: Any, ids: Tensor, new_tokens: int) -> dict[str, Any]:
    gc.collect()
    if ids.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([clock]),
    )
    each = [(b - a) * 1e3 for a, b in zip(clock.seconds, clock.seconds[1:], strict=False)]
    peak = torch.cuda.max_memory_allocated() if ids.is_cuda else None
    # The first steps compile kernels.
    return {"ms": each, "median_ms": statistics.median(each[len(each) // 4 :]), "peak_bytes": peak}


PARTS = {"copy": copies, "kernels": single_kernels, "step": steps, "model": whole_model}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "vocab_size": 128256,
}
SMALL = {**LLAMA_8B, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 64}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--rehearse", action="store_true", help="small sizes on a CPU; the times mean nothing")
    options = parser.parse_args()
    if unknown := set(options.parts.split(",")) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.rehearse:
        device, options.dtype, options.model, options.repeats = "cpu", torch.float32, SMALL, 1
        options.lengths, options.batches, options.budgets = [100, 300], [1, 2], [16, 128]
        options.model_lengths, options.new_tokens, options.copy_bytes = [60], 3, [2**12]
    elif not torch.cuda.is_available():
        print(
            "sparse_gpu.py times CUDA kernels and found no CUDA device; --rehearse tries it on a CPU", file=sys.stderr
        )
        return 2
    elif not kernels.available("cuda"):
        print(f"no kernels: Triton is missing, the GPU is too old, or {VARIABLE} forbids them", file=sys.stderr)
        return 2
    else:
        device, options.dtype, options.model = "cuda", torch.bfloat16, LLAMA_8B
        options.lengths = [8192, 16384, 32768, 65536, 131072]
        options.batches, options.budgets = [1, 8], [64, 128, 1024]
        options.model_lengths, options.new_tokens, options.copy_bytes = [8192, 32768, 65536], 32, [2**28, 2**31]
    bench = Bench(device, options.repeats, torch.empty(2**28 if device == "cuda" else 1, device=device))
    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, a rehearsal",
        "torch": torch.__version__,
        "longfit": longfit.__version__,
        "dtype": str(options.dtype),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for part in options.parts.split(","):
        results = []
        for result in PARTS[part](bench, options):
            results.append(result)
            print(*(f"{name}={value}" for name, value in result.items() if name not in ("us", "ms")), end=" ")
            if "us" in result:
                median = best(result["us"])
                print(f"{median:.1f} us, {result['bytes'] / median / 1e3:.0f} GB/s", end="")
            print(flush=True)
            # Written after every result: a run that is cut off keeps what it has.
            (options.output / f"{part}.json").write_text(json.dumps({**about, "results": results}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

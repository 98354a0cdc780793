"""Prefill under attention patterns: do time and memory grow with the window or with the input?

    python recipes/bench/patterns.py [--model smollm2-135m] [--lengths 2048,4096,8192,16384]
        [--patches sliding_window,lm_infinite] [--window 1024] [--chunk 1024] [--threads 1]
        [--layers N] [--out runs/patterns]

Every cell is a fresh process: full attention and the patches in turn, at one length after the other, on the same
ids and in chunks of the same size, so that only the attention differs. Full attention streams through longfit with
everything kept. A small input warms the kernels up first. With `--layers` only the model's first layers run: the
ratios are those of a whole model, as its layers are alike, and come sooner. Printed for each cell: seconds by the
clock; CPU seconds, which a busy machine changes less, and their ratio to full attention at the same length in the same
run; the peak of resident memory above what was there before (Linux); bytes stored at the end. Results:
docs/attention/prefill.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WARM_UP_TOKENS = 64


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Prefill once in this process."""
    import torch

    import longfit
    from longfit.attention import get
    from longfit.bench import measure as gauges
    from longfit.compressors import KeepAll

    torch.set_num_threads(cell["threads"])
    model, tokenizer = longfit.load(cell["model"])
    ids = torch.randint(100, len(tokenizer) - 100, (1, cell["tokens"]), generator=torch.Generator().manual_seed(0))
    if cell["layers"]:
        model.model.layers = model.model.layers[: cell["layers"]]
        model.config.num_hidden_layers = cell["layers"]
    gauges.touch_weights(model)
    how: dict[str, Any] = {"chunk_tokens": cell["chunk"], "geometry": "original"}
    if cell["attention"] == "full":
        fitted = longfit.wrap(model, KeepAll(), budget="100%", **how)
    else:
        fitted = longfit.wrap(model, attention=get(cell["attention"], window_tokens=cell["window"]), **how)
    fitted.compress(ids[:, :WARM_UP_TOKENS])
    clock: dict[str, float] = {}

    def prefill() -> None:
        started, cpu = time.perf_counter(), time.process_time()
        fitted.compress(ids)
        clock.update(seconds=time.perf_counter() - started, cpu_seconds=time.process_time() - cpu)

    peak = gauges.measure_peak(prefill)["extra_peak_bytes"]
    return cell | clock | {"extra_peak_bytes": peak, "kv_bytes": fitted.fit_report.kv_bytes}


def in_fresh_process(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure a cell in a process of its own.

    Raises:
        RuntimeError: the process failed; the message is what it said.
    """
    done = subprocess.run([sys.executable, __file__, "--cell", json.dumps(cell)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{cell} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def row(result: dict[str, Any], full: dict[str, Any]) -> str:
    """A line of the table."""
    ratio = result["cpu_seconds"] / full["cpu_seconds"]
    peak, stored = result["extra_peak_bytes"] / 2**20, result["kv_bytes"] / 2**20
    return (
        f"| {result['tokens']:,} | {result['attention']} | {result['seconds']:.1f} | {result['cpu_seconds']:.1f} "
        f"| {ratio:.2f} | {peak:.0f} | {stored:.1f} |"
    )


def main() -> None:
    """Run all cells and print the table as it grows; raw lines go to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", default="2048,4096,8192,16384")
    parser.add_argument("--patches", default="sliding_window,lm_infinite")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, help="only the first so many; all by default")
    parser.add_argument("--out", type=Path, help="folder for samples.jsonl")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(json.loads(options.cell))))
        return
    print("| tokens | attention | seconds | CPU seconds | of full (CPU) | extra peak MiB | stored MiB |")
    print("|--:|---|--:|--:|--:|--:|--:|")
    for tokens in map(int, options.lengths.split(",")):
        full: dict[str, Any] = {}
        for attention in ["full", *options.patches.split(",")]:
            cell = {
                "model": options.model,
                "tokens": tokens,
                "attention": attention,
                "window": options.window,
                "chunk": options.chunk,
                "threads": options.threads,
                "layers": options.layers,
            }
            result = in_fresh_process(cell)
            full = full or result
            print(row(result, full), flush=True)
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                with (options.out / "samples.jsonl").open("a") as lines:
                    lines.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

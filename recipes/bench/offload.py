"""An input larger than the fast side: peak memory, fast and slow bytes, seconds a token, beside the full cache.

    python recipes/bench/offload.py [--model smollm2-135m] [--budget 96MiB] [--runs infllm:8192,infllm:4096,full:4096]

Each run is an attention (or `full`: everything kept, full attention) and a number of tokens, in a fresh process, so
that its peak is its own. Tokens are random ids: what is measured is bytes and time, not quality. The peak is that of
the process above its size once the weights were read and a few tokens had gone through the unwrapped model
(`PeakMeter`); the file of the slow side is not part of it. Seconds are wall time and, for a machine that is busy with
other things, CPU time of the process. docs/attention/offload.md has the results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

import longfit
from longfit.bench.measure import touch_weights

OPTIONS = {
    "sink_tokens": 32,
    "window_tokens": 512,
    "block_tokens": 64,
    "top_blocks": 8,
    "cached_blocks": 12,
}
MORE = {"ltri": {"recent_blocks": 4}}
NEW_TOKENS = 16


def measure(model_name: str, attention: str, tokens: int, budget: str, chunk_tokens: int) -> dict:
    """One run in this process."""
    model, _ = longfit.load(model_name)
    touch_weights(model)
    with torch.no_grad():
        model(torch.arange(8)[None])
    if attention == "full":
        longfit.wrap(model, "knorm", budget="100%", chunk_tokens=chunk_tokens, geometry="original")
    else:
        patch = longfit.attention.get(attention, **OPTIONS, **MORE.get(attention, {}))
        longfit.wrap(model, attention=patch, budget=budget, chunk_tokens=chunk_tokens)
    ids = torch.randint(1000, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    started = time.process_time()
    model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    cpu_seconds = time.process_time() - started
    report = model.fit_report
    asked = report.page_hits + report.page_reads
    return {
        "attention": attention,
        "tokens": tokens,
        "dtype": str(model.dtype),
        "peak_bytes": report.peak_bytes,
        "fast_bytes": report.kv_bytes,
        "slow_bytes": report.offloaded_bytes,
        "full_kv_bytes": report.full_kv_bytes,
        "budget": report.budget,
        "prefill_seconds": report.prefill_seconds,
        "cpu_seconds": cpu_seconds,
        "prefill_tokens_per_second": tokens / report.prefill_seconds,
        "decode_seconds_per_token": report.decode_seconds / report.new_tokens,
        "read_bytes_per_token": report.read_bytes / report.new_tokens,
        "page_hit_share": report.page_hits / asked if asked else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--budget", default="96MiB", help="Of the fast side and the working set of a chunk.")
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--runs", default="infllm:8192,infllm:4096,full:4096")
    parser.add_argument("--one", help="attention:tokens in this process.")
    parser.add_argument("-o", "--output", type=Path, help="A file of one JSON object a line, appended.")
    options = parser.parse_args()
    if options.one:
        attention, tokens = options.one.split(":")
        print(json.dumps(measure(options.model, attention, int(tokens), options.budget, options.chunk_tokens)))
        return
    for run in options.runs.split(","):
        same = ["--model", options.model, "--budget", options.budget, "--chunk-tokens", str(options.chunk_tokens)]
        done = subprocess.run(
            [sys.executable, __file__, *same, "--one", run], check=True, stdout=subprocess.PIPE, text=True
        )
        line = done.stdout.strip().splitlines()[-1]
        print(line, flush=True)
        if options.output:
            with options.output.open("a") as lines:
                lines.write(line + "\n")


if __name__ == "__main__":
    main()

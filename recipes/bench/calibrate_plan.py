"""Compare the peak that longfit.plan predicts with the peak of a fresh process, shape by shape.

Run:  python recipes/bench/calibrate_plan.py                  # the table of docs/memory.md, about 15 minutes
      python recipes/bench/calibrate_plan.py --shape wide --dtype float32 --chunk 1024 --kept 512 --terms
      python recipes/bench/calibrate_plan.py --first-run      # what the first run of a process takes
      python recipes/bench/calibrate_plan.py --malloc default # glibc as it comes

Every measurement is a process of its own: constant weights, a warm-up, then the resident high-water mark is
reset (Linux, /proc/self/clear_refs) and four chunks are compressed. The measured extra is the new high-water
mark less the resident size before: weights and libraries are in neither number. With fixed thresholds glibc
gives freed arrays back at once, so the warm-up is the same work, which loads every kernel that it needs;
with glibc as it comes, what a warm-up frees would hide the peak, so it is 16 tokens.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "smollm2": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152,
    ),
    "wide": dict(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=32000,
    ),
    "small": dict(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=1000,
    ),
}  # fmt: skip
STREAMED_CHUNKS = 4
FIXED_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not report {field}")


def configuration(case: dict[str, Any]) -> Any:
    """The Llama configuration of a case."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **SHAPES[case["shape"]],
        tie_word_embeddings=True,
        dtype=case["dtype"],
        max_position_embeddings=2**20,
        bos_token_id=1,
        eos_token_id=2,
    )


def measure(case: dict[str, Any]) -> dict[str, int]:
    """Compress a random input with the wrapped model of ``case`` in this process; report plan and peak."""
    import torch
    from transformers import LlamaForCausalLM

    from longfit.model import wrap

    config = configuration(case)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(getattr(torch, case["dtype"])).to_empty(device="cpu").eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(0.01)
    tokens = STREAMED_CHUNKS * case["chunk"]
    model = wrap(model, case["method"], budget=f"{case['kept']} tokens", chunk_tokens=case["chunk"])
    ids = torch.arange(tokens).remainder(config.vocab_size)[None]
    model.compress(ids if case["warm"] else ids[:, :16])
    before = resident_bytes("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as failure:
        raise RuntimeError(f"the high-water mark cannot be reset here: {failure}") from failure
    if case["generate"]:
        model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    else:
        model.compress(ids)
    peak = resident_bytes("VmHWM") - before
    planned = model.longfit.plan(tokens=tokens)
    predicted = {"predicted": planned.prefill_peak_bytes, "stored": planned.kv_kept_bytes}
    return {"measured": peak, **predicted, **planned.working_set}


def row(case: dict[str, Any], malloc: str, terms: bool) -> str:
    """Measure a case in a fresh process and give its row of the table."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if malloc == "fixed":
        environment |= FIXED_THRESHOLDS
    command = [sys.executable, __file__, "--child", json.dumps(case)]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if child.returncode:
        sys.exit(child.stderr)
    result = json.loads(child.stdout.splitlines()[-1])
    mib = {name: value / 2**20 for name, value in result.items()}
    cells = [case["shape"], case["dtype"], case["method"], str(case["chunk"]), str(case["kept"])]
    cells += [f"{mib[name]:.1f}" for name in ("stored", "predicted", "measured")]
    line = f"| {' | '.join(cells)} | {result['predicted'] / result['measured']:.2f} |"
    return line + (f"\n    { ({name: round(value, 2) for name, value in mib.items()}) }" if terms else "")


def main() -> None:
    """Print one row per case as Markdown."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--chunk", type=int, action="append")
    parser.add_argument("--kept", type=int, action="append")
    parser.add_argument("--method", default="knorm")
    parser.add_argument("--malloc", choices=["fixed", "default"], default="fixed", help="glibc's mmap threshold")
    parser.add_argument("--first-run", action="store_true", help="warm up with 16 tokens only")
    parser.add_argument("--generate", action="store_true", help="generate two tokens too")
    parser.add_argument("--terms", action="store_true", help="print the terms of every prediction")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(json.loads(options.child))))
        return
    print("| shape | dtype | method | chunk | kept | stored MiB | predicted MiB | measured MiB | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    cases = itertools.product(
        options.shape or ["smollm2", "wide"],
        options.dtype or ["float32", "bfloat16"],
        options.chunk or [256, 512, 1024, 2048],
        options.kept or [512],
    )
    for shape, dtype, chunk, kept in cases:
        case = {"shape": shape, "dtype": dtype, "chunk": chunk, "kept": kept}
        case |= {
            "method": options.method,
            "generate": options.generate,
            "warm": options.malloc == "fixed" and not options.first_run,
        }
        print(row(case, options.malloc, options.terms), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()

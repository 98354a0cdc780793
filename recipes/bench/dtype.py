"""bfloat16 against float32 on this CPU: which dtype should a model be loaded in?

    python recipes/bench/dtype.py [--model smollm2-135m] [--tokens 2048] [--threads 1,2] [--repeats 5]

Both dtypes are loaded in one process and take turns, so that a busy machine slows them alike; the figure of
each is the fastest of the turns, and what counts is their ratio; the median of the ratios turn by turn stands
beside it. Three things are timed: prefill of `--tokens` tokens; decode after them with the attention call that
transformers makes; and the same decode with the query rows of a key/value head packed into one product, which
needs no copies of keys and values. What stands behind `longfit.loading.auto_dtype` is in docs/dtype.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from longfit.loading import load

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NEW_TOKENS = 16


def packed_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """sdpa, but one query token of H heads becomes H/G query rows of each of the G key/value heads."""
    batch, heads, tokens, size = query.shape
    groups = key.shape[1]
    if tokens > 1 or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    rows = query.reshape(batch, groups, heads // groups, size)
    weights = torch.softmax(rows @ key.transpose(-1, -2) * scaling, dim=-1, dtype=torch.float32)
    # (B, G, H/G, D) -> (B, 1, H, D)
    return (weights.to(value.dtype) @ value).reshape(batch, 1, heads, size), None


AttentionInterface.register("packed_rows", packed_attention)
AttentionMaskInterface.register("packed_rows", sdpa_mask)


def prefill(model: PreTrainedModel, ids: torch.Tensor) -> object:
    return model(ids, use_cache=True, logits_to_keep=1).past_key_values


def decode(model: PreTrainedModel, cache: object, token: torch.Tensor) -> None:
    for _ in range(NEW_TOKENS):
        token = model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


@torch.inference_mode()
def measure(models: dict[str, PreTrainedModel], ids: torch.Tensor, repeats: int) -> dict[str, dict[str, list]]:
    """Seconds by what was timed and dtype, one entry a turn; decode in seconds a token."""
    spent = {what: {name: [] for name in models} for what in ("prefill", "decode", "decode packed")}
    for _ in range(repeats):
        caches = {}
        for name, model in models.items():
            model.set_attn_implementation("sdpa")
            taken, caches[name] = seconds(lambda model=model: prefill(model, ids))
            spent["prefill"][name].append(taken)
        # Decode is short: several turns, so that one disturbance does not hit one dtype alone.
        for what, attention in (("decode", "sdpa"), ("decode packed", "packed_rows")) * 3:
            for name, model in models.items():
                model.set_attn_implementation(attention)
                cache = caches[name]
                taken, _ = seconds(lambda model=model, cache=cache: decode(model, cache, ids[:, -1:]))
                spent[what][name].append(taken / NEW_TOKENS)
                cache.crop(-NEW_TOKENS)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()

    models = {}
    for name, dtype in DTYPES.items():
        models[name], _ = load(options.model, dtype=dtype, device="cpu")
    vocabulary = models["float32"].config.vocab_size
    ids = torch.randint(vocabulary, (1, options.tokens), generator=torch.Generator().manual_seed(0))

    flags = {flag: value for flag, value in torch.cpu.get_capabilities().items() if "bf16" in flag}
    report = {
        "model": options.model,
        "tokens": options.tokens,
        "torch": torch.__version__,
        "cpu": flags,
        "runs": [],
    }
    print(f"{options.model}, {options.tokens} tokens, torch {torch.__version__}, CPU {flags}")
    print(
        "| threads | what | bfloat16 | float32 | float32 / bfloat16 | median of the turns |\n|---|---|---|---|---|---|"
    )
    for threads in (int(count) for count in options.threads.split(",")):
        torch.set_num_threads(threads)
        for what, spent in measure(models, ids, options.repeats).items():
            bf16, fp32 = min(spent["bfloat16"]), min(spent["float32"])
            turns = statistics.median(b / a for a, b in zip(spent["bfloat16"], spent["float32"], strict=True))
            report["runs"].append({"threads": threads, "what": what, "seconds": spent, "ratio": fp32 / bf16})
            print(
                f"| {threads} | {what} | {bf16 * 1e3:.1f} ms | {fp32 * 1e3:.1f} ms | {fp32 / bf16:.2f} | {turns:.2f} |",
                flush=True,
            )
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

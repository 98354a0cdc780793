"""kvpress' answers to given samples: `.venv-kvpress/bin/python recipes/kvpress/answer.py JOB.json`.

Runs in kvpress' own environment (setup.sh) and does not import longfit. The job names a model folder and a file of
samples (token ids of context and question, references, the longest answer, and the cells: press and ratio kept); each
answer is one JSON line on stdout, as soon as it is there. As kvpress' own pipeline does, the context is compressed
before the question is known, and the question's positions continue after the whole context, or after the kept entries
where the press numbers them anew.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "longfit" / "bench"))
import kvpress_worker
import measure

ALONE = ("kvzip",)  # reads the context a second time


def settled(text: str, sample: dict[str, Any]) -> bool:
    """Whether a substring metric cannot change any more: every reference (or any, for "part") is there."""
    found = [answer.lower() in text.lower() for answer in sample["answers"]]
    return (sample["metric"] == "string_match_all" and all(found)) or (
        sample["metric"] == "string_match_part" and any(found)
    )


Masks = list[Any]  # of each layer: what a press hides instead of dropping it, or None


def compress(model: Any, context: torch.Tensor, presses: list[Any]) -> list[tuple[DynamicCache, Masks]]:
    """What each press leaves of the context, from one forward.

    A press is a hook behind each layer's attention that reads that layer's keys and values and replaces them in the
    cache; the next layer reads hidden states, not the cache. So each finds here what it would find alone.
    """
    whole, left = DynamicCache(config=model.config), [(DynamicCache(config=model.config), []) for _ in presses]

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = whole.layers[module.layer_idx]
        for press, (cache, masks) in zip(presses, left, strict=True):
            torch.manual_seed(module.layer_idx)  # a random press draws the same, whoever was here before it
            keys, values, module.masked_key_indices = layer.keys, layer.values, None
            if press is not None:
                keys, values = press.compress(module, kwargs["hidden_states"], keys, values, output[1], kwargs)
            cache.update(keys, values, module.layer_idx)
            masks.append(module.masked_key_indices)

    for press in presses:
        if press is not None:
            press.post_init_from_model(model)
    with contextlib.ExitStack() as hooks:
        for layer in model.model.layers:
            layer.self_attn.rotary_emb = model.model.rotary_emb
            hooks.callback(layer.self_attn.register_forward_hook(hook, with_kwargs=True).remove)
        model(context, past_key_values=whole, logits_to_keep=1)
    return left


def compress_alone(model: Any, context: torch.Tensor, press: Any) -> tuple[DynamicCache, Masks]:
    """What a press leaves that is more than such a hook."""
    cache = DynamicCache(config=model.config)
    with press(model):
        model(context, past_key_values=cache, logits_to_keep=1)
    return cache, [layer.self_attn.masked_key_indices for layer in model.model.layers]


def answer(
    model: Any, tokenizer: Any, renumbered: bool, sample: dict[str, Any], cache: DynamicCache, masks: Masks
) -> dict[str, Any]:
    """One greedy answer, what was kept of the context, and seconds."""
    question, tokens, started = torch.tensor([sample["question_ids"]]), len(sample["context_ids"]), time.perf_counter()
    for layer, mask in zip(model.model.layers, masks, strict=True):
        layer.self_attn.masked_key_indices = mask
    kept = sum(layer.keys.shape[2] for layer in cache.layers) / len(cache.layers)
    kept -= kvpress_worker.masked_share(model, tokens) * tokens
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    start = cache.get_seq_length() if renumbered else tokens
    positions = torch.arange(start, start + question.shape[1])[None]
    logits = model(question, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits[0, -1]
    first = time.perf_counter() - started
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    new, text, place = [], "", int(positions[0, -1])
    while len(new) < sample["max_new_tokens"]:
        new.append(int(logits.argmax()))
        text = tokenizer.decode(new, skip_special_tokens=True)
        if new[-1] in ends or settled(text, sample) or len(new) == sample["max_new_tokens"]:
            break
        place += 1
        step = torch.tensor([[new[-1]]])
        where = torch.tensor([[place]])
        logits = model(step, past_key_values=cache, position_ids=where, logits_to_keep=1).logits[0, -1]
    spent = {"prefill_seconds": first, "decode_seconds": time.perf_counter() - started - first}
    return {"answer": text, "new_tokens": len(new), "kept_tokens": round(kept, 2), "kv_bytes": size} | spent


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """An answer for each of the sample's cells; those that can share one prefill."""
    context = torch.tensor([sample["context_ids"]])
    presses = {(name, ratio): kvpress_worker.build_press(name, 1 - ratio, {}) for name, ratio in sample["cells"]}
    sharing = [cell for cell in presses if cell[0] not in ALONE]
    started = time.perf_counter()
    found = compress(model, context, [presses[cell] for cell in sharing]) if sharing else []
    left = dict(zip(sharing, found, strict=True))
    shared_seconds = time.perf_counter() - started
    for cell, press in presses.items():
        started = time.perf_counter()
        cache, masks = left.pop(cell) if cell in left else compress_alone(model, context, press)
        seconds = shared_seconds if cell in sharing else time.perf_counter() - started
        line = answer(model, tokenizer, kvpress_worker.renumbers(press), sample, cache, masks)
        line["prefill_seconds"] += seconds
        yield {"sample": sample["sample"], "cell": cell} | line


def main(job_file: str) -> None:
    measure.die_with_parent()
    job = json.loads(Path(job_file).read_text())
    lines = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        logging.disable_progress_bar()
        torch.set_num_threads(job["threads"])
        model = AutoModelForCausalLM.from_pretrained(
            job["model_folder"], dtype=getattr(torch, job["dtype"]), attn_implementation=job["attention"]
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(job["model_folder"])
        for line in Path(job["samples"]).read_text().splitlines():
            for found in answers(model, tokenizer, json.loads(line)):
                print(json.dumps(found, ensure_ascii=False), file=lines, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

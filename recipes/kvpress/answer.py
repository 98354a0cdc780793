"""kvpress' answers to given samples: `.venv-kvpress/bin/python recipes/kvpress/answer.py JOB.json`.

Runs in kvpress' own environment (setup.sh) and does not import longfit. The job names a model folder, a press, a ratio
and a file of samples (token ids of context and question, references, the longest answer); each answer is one JSON line
on stdout, as soon as it is there. As kvpress' own pipeline does, the context is compressed before the question is
known, and the question's positions continue after the whole context, or after the kept entries where the press numbers
them anew.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "longfit" / "bench"))
import kvpress_worker
import measure


def settled(text: str, sample: dict[str, Any]) -> bool:
    """Whether a substring metric cannot change any more: every reference (or any, for "part") is there."""
    found = [answer.lower() in text.lower() for answer in sample["answers"]]
    return (sample["metric"] == "string_match_all" and all(found)) or (
        sample["metric"] == "string_match_part" and any(found)
    )


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, press: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """One greedy answer, what was kept of the context, and seconds."""
    context, question = (torch.tensor([sample[name]]) for name in ("context_ids", "question_ids"))
    cache, started, tokens = DynamicCache(config=model.config), time.perf_counter(), context.shape[1]
    with press(model) if press is not None else contextlib.nullcontext():
        model(context, past_key_values=cache, logits_to_keep=1)
    kept = sum(layer.keys.shape[2] for layer in cache.layers) / len(cache.layers)
    kept -= kvpress_worker.masked_share(model, tokens) * tokens
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    start = cache.get_seq_length() if kvpress_worker.renumbers(press) else tokens
    positions = torch.arange(start, start + question.shape[1])[None]
    logits = model(question, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits[0, -1]
    prefill = time.perf_counter() - started
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
    spent = {"prefill_seconds": round(prefill, 3), "decode_seconds": round(time.perf_counter() - started - prefill, 3)}
    return {"answer": text, "new_tokens": len(new), "kept_tokens": round(kept, 2), "kv_bytes": size} | spent


def main(job_file: str) -> None:
    measure.die_with_parent()
    job = json.loads(Path(job_file).read_text())
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        logging.disable_progress_bar()
        torch.set_num_threads(job["threads"])
        attention = kvpress_worker.PRESSES[job["press"]][2]
        model = AutoModelForCausalLM.from_pretrained(
            job["model_folder"], dtype=getattr(torch, job["dtype"]), attn_implementation=attention
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(job["model_folder"])
        for line in Path(job["samples"]).read_text().splitlines():
            sample = json.loads(line)
            torch.manual_seed(0)  # a random press draws the same for a sample, whichever were answered before it
            press = kvpress_worker.build_press(job["press"], 1 - job["keep_ratio"], job["options"])
            record = {"sample": sample["sample"]} | answer(model, tokenizer, press, sample)
            print(json.dumps(record, ensure_ascii=False), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

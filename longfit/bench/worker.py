"""One benchmark cell in a fresh process: `python -m longfit.bench.worker '<cell as JSON>'`.

Prints one JSON line. The systems are plain `generate`, plain with transformers' own chunked prefill, and a
longfit method; kvpress has its own worker.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessorList, PreTrainedModel

from longfit.bench import measure
from longfit.user_code import load_from_environment


def load_model(cell: dict[str, Any]) -> PreTrainedModel:
    """The cell's model in its dtype, on the CPU, ready to run."""
    dtype = getattr(torch, cell["dtype"])
    return AutoModelForCausalLM.from_pretrained(cell["model_folder"], dtype=dtype, attn_implementation="sdpa").eval()


def generation_options(input_ids: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """Greedy, exactly `new_tokens` long: the end token is not allowed to end it."""
    return {
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }


class PlainSystem:
    """Full attention over a growing DynamicCache; `plain_chunked` cuts the prefill as transformers can."""

    def __init__(self, model: Any, cell: dict[str, Any]) -> None:
        self.model = model
        chunked = cell["system"] == "plain_chunked"
        self.options = {"prefill_chunk_size": cell["prefill_chunk_size"]} if chunked else {}
        self.found: dict[str, Any] = {}

    def generate(self, input_ids: torch.Tensor, new_tokens: int, processors: LogitsProcessorList) -> None:
        cache = DynamicCache(config=self.model.config)
        options = generation_options(input_ids, new_tokens) | self.options
        self.model.generate(input_ids, past_key_values=cache, logits_processor=processors, **options)
        self.found = measure.cache_contents(cache, new_tokens)


class LongfitSystem:
    """The model wrapped with one method; what it kept and spent comes from its own report."""

    REPORTED = ("kept_tokens", "kv_bytes", "score_seconds", "chunks", "chunk_tokens")

    def __init__(self, model: PreTrainedModel, cell: dict[str, Any]) -> None:
        import longfit

        name = cell["system"].split(":", 1)[1]
        budget = f"{cell['kept_tokens']} tokens"
        self.model = longfit.wrap(model, name, budget=budget, chunk_tokens=cell["chunk_tokens"], **cell["options"])
        self.found: dict[str, Any] = {}

    def generate(self, input_ids: torch.Tensor, new_tokens: int, processors: LogitsProcessorList) -> None:
        options = generation_options(input_ids, new_tokens)
        self.model.generate(input_ids, logits_processor=processors, **options)
        fit_report = self.model.fit_report
        self.found = {name: getattr(fit_report, name, None) for name in self.REPORTED}
        self.found["reported_prefill_seconds"] = fit_report.prefill_seconds


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, measure; the dict that becomes one line of samples.jsonl."""
    torch.set_num_threads(cell["threads"])
    torch.manual_seed(0)
    model = load_model(cell)
    input_ids = torch.from_numpy(np.load(cell["prompt"])[: cell["length"]].astype(np.int64))[None]
    system_class = LongfitSystem if cell["system"].startswith("longfit:") else PlainSystem
    new_tokens = cell["new_tokens"]
    with torch.inference_mode():
        measure.touch_weights(model)
        if cell["measure"] == "memory":
            # Loads the kernels' code pages; through the unwrapped model, so that no state of a system stays.
            model(input_ids[:, : measure.MEMORY_WARM_UP_TOKENS])
            system = system_class(model, cell)
            timing: dict[str, Any] = {}
            peak = measure.measure_peak(
                lambda: timing.update(measure.time_generation(system.generate, input_ids, new_tokens))
            )
            result = timing | peak
        else:
            system = system_class(model, cell)
            warm_up = input_ids[:, : measure.WARM_UP_TOKENS]
            system.generate(warm_up, min(new_tokens, 2), LogitsProcessorList())
            result = measure.time_generation(system.generate, input_ids, new_tokens)
    result |= system.found
    # The report counts the scoring of decode too, so the share is that of prefill for one new token only.
    if result.get("score_seconds") is not None and new_tokens == 1:
        result["score_share"] = result["score_seconds"] / result["prefill_seconds"]
    result["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    return result


def main() -> None:
    """Entry point of the subprocess."""
    measure.die_with_parent()
    load_from_environment()
    cell = json.loads(Path(sys.argv[1]).read_text() if Path(sys.argv[1]).is_file() else sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        result = run_cell(cell)
    measure.report(result)


if __name__ == "__main__":
    main()

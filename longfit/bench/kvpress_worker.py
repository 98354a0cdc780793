"""One benchmark cell of kvpress: `.venv-kvpress/bin/python longfit/bench/kvpress_worker.py '<cell as JSON>'`.

Runs in kvpress' own environment (recipes/kvpress/setup.sh) and does not import longfit; the same prompt ids,
clock and memory gauge as `worker.py`. `kvpress:none` is plain `generate` there, which tells how much of a
difference is that of the transformers versions.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

WINDOW_TOKENS = 64  # of finch, where the prompt has no delimiter before its question

# name -> (press, press it wraps or None, attention it needs)
PRESSES: dict[str, tuple[str | None, str | None, str]] = {
    "none": (None, None, "sdpa"),
    "random": ("RandomPress", None, "sdpa"),
    "knorm": ("KnormPress", None, "sdpa"),
    "keydiff": ("KeyDiffPress", None, "sdpa"),
    "lagkv": ("LagKVPress", None, "sdpa"),
    "streaming_llm": ("StreamingLLMPress", None, "sdpa"),
    "streaming_llm_rerotated": ("KeyRerotationPress", "StreamingLLMPress", "sdpa"),
    "h2o": ("ObservedAttentionPress", None, "eager"),
    "tova": ("TOVAPress", None, "sdpa"),
    "snapkv": ("SnapKVPress", None, "sdpa"),
    "pyramidkv": ("PyramidKVPress", None, "sdpa"),
    "expected_attention": ("ExpectedAttentionPress", None, "sdpa"),
    "adakv": ("AdaKVPress", "SnapKVPress", "sdpa"),
    "chunkkv": ("ChunkKVPress", "SnapKVPress", "sdpa"),
    "kvzip": ("KVzipPress", None, "sdpa"),
    "finch": ("FinchPress", None, "sdpa"),
}


def compression_ratio(length: int, kept_tokens: int) -> float:
    """The ratio at which kvpress keeps exactly `kept_tokens` of `length`.

    kvpress truncates `length * (1 - ratio)`; half a token on top guards against 2047.9999.
    """
    return 0.0 if kept_tokens >= length else 1 - (kept_tokens + 0.5) / length


def build_press(name: str, ratio: float, options: dict[str, Any]) -> Any:
    """The press object that drops `ratio`, or None for `none`; `options` go to the press that scores."""
    import kvpress

    outer, inner, _ = PRESSES[name]
    if outer is None:
        return None
    window = options.get("window_size", WINDOW_TOKENS)
    if name == "finch":
        options = {option: value for option, value in options.items() if option != "window_size"}
    scorer = getattr(kvpress, inner or outer)(compression_ratio=ratio, **options)
    if name == "finch":
        # It looks for a delimiter before the question; -1 is never met, so the last tokens stand in for one.
        scorer.delimiter_token_id, scorer.window_size = -1, window
    return getattr(kvpress, outer)(scorer) if inner else scorer


def renumbers(press: Any) -> bool:
    """Whether kept keys are rotated to positions 0, 1, ..., so that what follows counts from there."""
    return type(press).__name__ == "KeyRerotationPress" or getattr(press, "rerotate_keys", None) is True


def masked_share(model: Any, tokens: int) -> float:
    """Share of the entries that head-wise presses hide while keeping them in memory."""
    layers = model.model.layers
    hidden = [getattr(layer.self_attn, "masked_key_indices", None) for layer in layers]
    heads = model.config.num_key_value_heads
    return sum(len(index[0]) for index in hidden if index is not None) / (len(layers) * heads * tokens)


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, measure; the same keys as `longfit.bench.worker.run_cell`."""
    import measure
    import numpy as np
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessorList

    torch.set_num_threads(cell["threads"])
    torch.manual_seed(0)
    name = cell["system"].split(":", 1)[1]
    model = AutoModelForCausalLM.from_pretrained(
        cell["model_folder"], dtype=getattr(torch, cell["dtype"]), attn_implementation=PRESSES[name][2]
    ).eval()
    input_ids = torch.from_numpy(np.load(cell["prompt"])[: cell["length"]].astype(np.int64))[None]
    ratio = compression_ratio(cell["length"], cell["kept_tokens"])
    press = build_press(name, ratio, cell["options"])
    found: dict[str, Any] = {}

    def generate(ids: torch.Tensor, new_tokens: int, processors: LogitsProcessorList) -> None:
        cache = DynamicCache(config=model.config)
        if name == "kvzip":
            _replay_then_decode(model, press, ids, cache, new_tokens, processors)
        else:
            with press(model) if press is not None else contextlib.nullcontext():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=cache,
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                    logits_processor=processors,
                )
        found.update(measure.cache_contents(cache, new_tokens))
        # Masked entries are not kept for attention, but they stay in kv_bytes: their memory is not freed.
        found["kept_tokens"] -= masked_share(model, ids.shape[1]) * ids.shape[1]

    with torch.inference_mode():
        measure.touch_weights(model)
        if cell["measure"] == "memory":
            model(input_ids[:, : measure.MEMORY_WARM_UP_TOKENS])
            timing: dict[str, Any] = {}
            peak = measure.measure_peak(
                lambda: timing.update(measure.time_generation(generate, input_ids, cell["new_tokens"]))
            )
            result = timing | peak
        else:
            generate(input_ids[:, : measure.WARM_UP_TOKENS], min(cell["new_tokens"], 2), LogitsProcessorList())
            result = measure.time_generation(generate, input_ids, cell["new_tokens"])
    result |= found
    result["versions"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvpress": _version(),
    }
    return result


def _replay_then_decode(model: Any, press: Any, ids: Any, cache: Any, new_tokens: int, processors: Any) -> None:
    """KVzip compresses when its context manager ends: `generate` inside it would decode uncompressed."""
    import torch

    with press(model):
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    for step in range(new_tokens):
        processors(ids, logits)
        if step == new_tokens - 1:
            return
        position = torch.tensor([[ids.shape[1] + step]])
        token = logits.argmax(-1, keepdim=True)
        logits = model(token, past_key_values=cache, position_ids=position, logits_to_keep=1).logits[:, -1]


def _version() -> str:
    from importlib.metadata import version

    return version("kvpress")


def main() -> None:
    """Entry point of the subprocess."""
    import measure

    measure.die_with_parent()
    cell = json.loads(Path(sys.argv[1]).read_text() if Path(sys.argv[1]).is_file() else sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        result = run_cell(cell)
    measure.report(result)


if __name__ == "__main__":
    main()

"""Clocks and memory gauges of one benchmark cell.

Imports torch, transformers and the standard library only: `kvpress_worker.py` uses this file by its path in
an environment that does not have longfit.
"""

import contextlib
import ctypes
import gc
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList

WARM_UP_TOKENS = 128
MEMORY_WARM_UP_TOKENS = 8

# generate(input_ids [1, T], new_tokens, logits_processor) -> None
Generate = Callable[[torch.Tensor, int, LogitsProcessorList], None]


class StepClock:
    """Notes the time at which the logits of each new token are there; changes nothing.

    Given to `generate` as a logits processor, it times prefill and decode within one call, so that the
    noise of a long prefill does not drown the decode as it would in a difference of two calls.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seconds.append(time.perf_counter())
        return scores


def time_generation(generate: Generate, input_ids: torch.Tensor, new_tokens: int) -> dict[str, float | None]:
    """Seconds until the first token's logits, and mean seconds for each token after it."""
    clock = StepClock()
    start = time.perf_counter()
    generate(input_ids, new_tokens, LogitsProcessorList([clock]))
    if len(clock.seconds) != new_tokens:
        raise RuntimeError(f"{len(clock.seconds)} steps were seen for {new_tokens} new tokens: nothing was timed")
    decode = (clock.seconds[-1] - clock.seconds[0]) / (new_tokens - 1) if new_tokens > 1 else None
    return {"prefill_seconds": clock.seconds[0] - start, "decode_seconds_per_token": decode}


def measure_peak(action: Callable[[], Any]) -> dict[str, Any]:
    """Peak resident memory of `action` in this process, in bytes: absolute and above what was there before.

    `peak_was_reset` is False where the kernel does not allow it; then the peak may be that of loading.
    """
    gc.collect()
    _return_free_memory()
    before = _status_bytes("VmRSS")
    was_reset = _reset_peak()
    action()
    peak = _status_bytes("VmHWM")
    return {
        "extra_peak_bytes": peak - before,
        "peak_bytes": peak,
        "before_bytes": before,
        "peak_was_reset": was_reset,
    }


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _reset_peak() -> bool:
    """Set VmHWM back to the present resident size."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _return_free_memory() -> None:
    # Free blocks that malloc still holds from loading would be reused unseen and hide part of the peak.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def touch_weights(model: torch.nn.Module) -> None:
    """Read every parameter, so that memory-mapped weights are resident before a peak is measured."""
    for parameter in model.parameters():
        parameter.detach().reshape(-1)[:: 4096 // parameter.element_size()].sum()


def cache_contents(cache: Any, new_tokens: int) -> dict[str, float]:
    """Entries of the prompt kept per layer and head, and bytes of all keys and values, of a cache."""
    layers = [layer for layer in cache.layers if layer.keys is not None]
    lengths = [layer.keys.shape[2] - (new_tokens - 1) for layer in layers]
    return {
        "kept_tokens": sum(lengths) / len(lengths),
        "kv_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in layers),
    }


def die_with_parent() -> None:
    """End this process soon after the runner ends: a worker left behind would disturb the next timings."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def report(result: dict[str, Any]) -> None:
    """Print the cell's result as the last line of stdout, where the runner looks for it."""
    print(json.dumps(result), flush=True)

"""What a plan predicts, against what the same work then takes: tensors alive, and a fresh process's peak."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Phi3Config

from longfit.budget import ModelShape, plan
from longfit.model import wrap

SCRIPT = Path(__file__).parents[1] / "recipes" / "bench" / "calibrate_plan.py"
CHUNK = 128
SMALL = dict(
    vocab_size=500, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=65536, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
HYBRID = ["sliding_attention", "sliding_attention", "full_attention"]
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "phi3": Phi3Config(**SMALL),
    "gemma3_text": Gemma3TextConfig(**SMALL, head_dim=32, sliding_window=64, layer_types=HYBRID),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=500, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=65536,
    ),
}  # fmt: skip


def live_peak(work) -> int:
    """The most bytes that torch's CPU allocator had given out at once during ``work``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        held = work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del held
    return peak


@pytest.mark.parametrize("kept", [64, 512])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_plan_counts_the_tensors_that_are_alive(family: str, kept: int) -> None:
    config = CONFIGS[family]
    model = AutoModelForCausalLM.from_config(config).eval()
    model = wrap(model, "knorm", budget=f"{kept} tokens", chunk_tokens=CHUNK)
    ids = torch.arange(kept + 3 * CHUNK).remainder(400)[None] + 3
    model.compress(ids[:, :8])
    planned = plan(
        replace(ModelShape.from_config(config), weights_bytes=0),
        tokens=ids.shape[1],
        budget=f"{kept} tokens",
        chunk_tokens=CHUNK,
    )
    measured = live_peak(lambda: model.compress(ids))
    assert 0.97 * measured <= planned.prefill_peak_bytes <= 1.1 * measured, planned.working_set


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident high-water mark of Linux")
def test_a_fresh_process_peaks_where_the_plan_says() -> None:
    # Large enough that the 4 to 6 MiB of code and buffers that a process's first run loads are within the tenth.
    case = {"shape": "small", "dtype": "float32", "chunk": 2048, "kept": 2048, "method": "knorm"}
    case |= {"generate": False, "warm": False}
    # glibc's own threshold moves with what is freed, and then the peak depends on holes in its heap.
    fixed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--child", json.dumps(case)]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **fixed}, check=False)
    if "cannot be reset" in child.stderr:
        pytest.skip(child.stderr.splitlines()[-1])
    assert child.returncode == 0, child.stderr
    result = json.loads(child.stdout.splitlines()[-1])
    assert result["measured"] > 90 * 2**20
    assert result["predicted"] == pytest.approx(result["measured"], rel=0.1)

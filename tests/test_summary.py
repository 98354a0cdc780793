"""From records to a summary: intervals, paired differences, costs."""

import json

import pytest

from longfit.errors import InputError
from longfit.eval import records
from longfit.eval.summary import summarise
from tests.tiny_sweep import MODEL


def record(cell: str, index: int, score: float, task: str = "a", **more) -> dict:
    method, _, budget = cell.partition("-")
    return {
        "model": MODEL,
        "length": 100,
        "cell": cell,
        "sample": f"{task}-{index:04d}",
        "task": task,
        "method": method,
        "options": {},
        "budget": budget or "100%",
        "keep_ratio": 0.25 if budget else 1.0,
        "awareness": "agnostic",
        "chunk_tokens": None,
        "metric": "match",
        "higher_is_better": True,
        "score": score,
        "kept_tokens": 10,
        "kv_bytes": 2**20,
        "full_kv_bytes": 2**22,
        "tokens_in": 100,
        "prefill_seconds": 1.0,
        "decode_seconds": 2.0,
        "new_tokens": 5,
        "peak_bytes": None,
        "shared_prefill": True,
    } | more


def test_a_summary_has_intervals_paired_differences_and_costs():
    found = [record("full", i, 1.0, task) for task in "ab" for i in range(20)]
    found += [record("no_context", i, 0.0, task) for task in "ab" for i in range(20)]
    found += [record("toy-25%", i, float(i < 10), task) for task in "ab" for i in range(20)]
    found += [record("truncate-25%", i, float(i < 5), task) for task in "ab" for i in range(20)]
    alone = {"shared_prefill": False, "peak_bytes": 5}
    costs = [record("full", 0, 1.0, **alone), record("toy-25%", 0, 1.0, **alone | {"prefill_seconds": 1.5})]
    rows = {(row["cell"], row["task"]): row for row in summarise(found, costs)}
    one, mean = rows["toy-25%", "a"], rows["toy-25%", "mean"]
    assert (one["n"], one["score"]) == (20, 0.5) and 0.25 < one["low"] < 0.35 and 0.65 < one["high"] < 0.75
    assert one["minus_full"] == -0.5 and one["minus_full_high"] < -0.2
    assert one["minus_truncate"] == 0.25 and one["minus_truncate_low"] > 0
    assert one["normalised"] == mean["normalised"] == 0.5 and mean["n"] == 40
    assert mean["low"] > one["low"] and mean["high"] < one["high"]
    assert one["prefill_ratio"] == 1.5 and one["decode_ratio"] == 1.0 and one["peak_bytes"] == 5
    assert rows["full", "mean"]["low"] < 1 == rows["full", "mean"]["high"]
    assert rows["no_context", "a"]["minus_truncate"] is None and rows["no_context", "a"]["prefill_ratio"] is None


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps(record("full", 0, 1.0)) + "\nnonsense\n")
    with pytest.raises(InputError, match="line 2 is damaged"):
        records.read_records(tmp_path)

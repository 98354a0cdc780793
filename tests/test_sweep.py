"""Sweeps: a killed run resumes, loses nothing and repeats nothing; what was not compressed is an error."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from longfit.errors import InputError
from longfit.eval import answering, sweep, tables
from longfit.eval.recipe import Recipe
from tests.test_needle import byte_tokenizer

RECIPE = {
    "name": "tiny",
    "model": "none",
    "dtype": "float32",
    "tasks": ["niah_single", "niah_multikey"],
    "length": 700,
    "n": 4,
    "block_samples": 2,
    "max_new_tokens": 2,
    "cells": [
        {"methods": ["toy"], "keep_ratios": [0.5, 0.25], "awareness": ["agnostic", "aware"]},
        {"methods": ["full", "no_context"]},
        {"methods": ["truncate"], "keep_ratios": [0.5]},
    ],
}
CELLS, SAMPLES = 7, 8


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def loaded():
    return tiny_model(), byte_tokenizer()


class FakeFitted:
    """Stands where a wrapped model does: reports a ratio and lets the plain model answer."""

    def __init__(self, model, keep_ratio: float) -> None:
        self.model, self.keep_ratio, self.device, self.calls = model, keep_ratio, model.device, []

    def compress(self, input_ids):
        self._report(input_ids.shape[1])
        return "memory"

    def generate(self, input_ids, memory=None, question_tokens=None, **how):
        self.calls.append((input_ids.shape[1], memory, question_tokens))
        if memory is None:
            self._report(input_ids.shape[1])
        return self.model.generate(input_ids, **how)

    def _report(self, tokens: int) -> None:
        self.fit_report = SimpleNamespace(
            kept_tokens=int(self.keep_ratio * tokens),
            kv_bytes=1,
            prefill_seconds=0.1,
            tokens_in=tokens,
            method="Toy()",
            chunks=1,
            chunk_tokens=tokens,
        )


@pytest.fixture(autouse=True)
def fake_wrapper(monkeypatch):
    seen = []

    @contextmanager
    def wrapped(model, cell, chunk_tokens):
        ready = model if cell.method in tables.BASELINES else FakeFitted(model, cell.keep_ratio)
        seen.append((cell, ready))
        yield ready

    monkeypatch.setattr(sweep, "wrapped", wrapped)
    return seen


def lines(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_run_fills_the_grid_baselines_first_block_by_block(tmp_path, loaded):
    metrics = sweep.run(RECIPE, tmp_path, loaded=loaded)
    records = lines(tmp_path)
    assert metrics["finished"] == metrics["planned"] == len(records) == CELLS * SAMPLES
    cells = list(dict.fromkeys(record["cell"] for record in records))
    assert cells[:3] == ["full", "no_context", "truncate-50%"]
    assert cells[3:] == ["toy-50%-agnostic", "toy-50%-aware", "toy-25%-agnostic", "toy-25%-aware"]
    half = records[: len(records) // 2]
    assert {record["index"] for record in half} == {0, 1}
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["haystack"]["source"] == "noise"
    assert json.loads((tmp_path / "env.json").read_text())["threads"] == 1


def test_truncation_keeps_as_much_as_the_methods_and_the_question_whole(tmp_path, loaded):
    sweep.run(RECIPE, tmp_path, loaded=loaded)
    by_cell = {(r["cell"], r["sample"]): r for r in lines(tmp_path)}
    for (cell, sample), record in by_cell.items():
        whole = record["context_tokens"] + record["question_tokens"]
        if cell == "truncate-50%":
            assert record["kept_tokens"] == record["context_tokens"] // 2 + record["question_tokens"]
            assert (
                record["kept_tokens"] - record["question_tokens"] == by_cell["toy-50%-agnostic", sample]["kept_tokens"]
            )
        if cell == "full":
            assert record["kept_tokens"] == whole and record["kv_bytes"] == 2 * 1 * 1 * 8 * whole * 4
        if cell == "no_context":
            assert record["tokens_in"] < record["question_tokens"] + 200


def test_agnostic_compresses_the_context_alone_and_aware_names_the_question(tmp_path, loaded, fake_wrapper):
    sweep.run(RECIPE | {"n": 1}, tmp_path, loaded=loaded)
    records = {(r["cell"], r["task"]): r for r in lines(tmp_path)}
    for cell, ready in fake_wrapper:
        if cell.method != "toy":
            continue
        for task, call in zip(RECIPE["tasks"], ready.calls, strict=True):
            record = records[cell.cell_id, task]
            question = record["question_tokens"]
            whole = record["context_tokens"] + question
            assert call == ((question, "memory", None) if cell.awareness == "agnostic" else (whole, None, question))
            assert record["tokens_in"] == (record["context_tokens"] if cell.awareness == "agnostic" else whole)


def test_a_second_start_does_nothing_and_a_cut_line_is_done_again(tmp_path, loaded):
    sweep.run(RECIPE, tmp_path, loaded=loaded, limit=1)
    file = tmp_path / "samples.jsonl"
    before = file.read_bytes()
    sweep.run(RECIPE, tmp_path, loaded=loaded, limit=1)
    assert file.read_bytes() == before
    file.write_bytes(before[:-40])
    assert len(tables.read_records(tmp_path)) == 2 * CELLS - 1
    sweep.run(RECIPE, tmp_path, loaded=loaded)
    pairs = [(record["cell"], record["sample"]) for record in lines(tmp_path)]
    assert len(pairs) == len(set(pairs)) == CELLS * SAMPLES


def test_shards_share_a_folder_and_make_the_whole(tmp_path, loaded):
    sweep.run(RECIPE, tmp_path, loaded=loaded, shard="1/2")
    metrics = sweep.run(RECIPE, tmp_path, loaded=loaded, shard="2/2")
    assert metrics["finished"] == CELLS * SAMPLES
    assert sweep.run(RECIPE, tmp_path, loaded=loaded) == metrics
    for bad in ("0/2", "3/2", "x", "1/"):
        with pytest.raises(InputError, match="1/4"):
            sweep.run(RECIPE, tmp_path, loaded=loaded, shard=bad)


def test_shards_split_the_depths_evenly():
    first = [index for index in range(20) if sweep._mine(index, (1, 2))]
    assert len(first) == 10 and {index % 2 for index in first} == {0, 1}


def test_two_sweeps_may_not_write_to_one_folder(tmp_path, loaded):
    with sweep._locked(tmp_path, ""):
        for shard in (None, "1/2"):
            with pytest.raises(InputError, match="another sweep"):
                sweep.run(RECIPE, tmp_path, loaded=loaded, shard=shard)
    refused = pytest.raises(InputError, match="another sweep")
    with sweep._locked(tmp_path, "-1of2"), sweep._locked(tmp_path, "-2of2"), refused:
        sweep.run(RECIPE, tmp_path, loaded=loaded)


def test_a_folder_holds_one_run_but_takes_more_cells(tmp_path, loaded):
    small = RECIPE | {"cells": RECIPE["cells"][1:]}
    sweep.run(small, tmp_path, loaded=loaded, limit=1)
    with pytest.raises(InputError, match="seed"):
        sweep.run(RECIPE | {"seed": 1}, tmp_path, loaded=loaded)
    assert sweep.run(RECIPE, tmp_path, loaded=loaded, limit=1)["finished"] == 2 * CELLS


def test_a_cell_that_compressed_nothing_fails_loudly_and_the_others_go_on(tmp_path, loaded, monkeypatch):
    @contextmanager
    def wrapped(model, cell, chunk_tokens):
        yield model if cell.method in tables.BASELINES else FakeFitted(model, 1.0)

    monkeypatch.setattr(sweep, "wrapped", wrapped)
    with pytest.raises(sweep.SweepError, match=r"4 of 7 cells failed.*nothing was compressed"):
        sweep.run(RECIPE, tmp_path, loaded=loaded)
    assert len(lines(tmp_path)) == 3 * SAMPLES
    assert len((tmp_path / "errors.jsonl").read_text().splitlines()) == 4
    monkeypatch.undo()
    monkeypatch.setattr(
        sweep,
        "wrapped",
        lambda m, c, k: _yield(m if c.method in tables.BASELINES else FakeFitted(m, c.keep_ratio)),
    )
    assert sweep.run(RECIPE, tmp_path, loaded=loaded)["finished"] == CELLS * SAMPLES


@contextmanager
def _yield(value):
    yield value


def test_a_cell_that_kept_too_much_fails(loaded):
    with pytest.raises(answering.BudgetExceededError, match="above 25%"):
        answering.check_kept(Recipe.read(RECIPE).expand()[5], kept_tokens=300, tokens_in=1000, new_tokens=16)


def test_real_methods_answer_through_the_wrapper(tmp_path, loaded, monkeypatch):
    monkeypatch.setattr(sweep, "wrapped", answering.wrapped)
    cells = [
        {"methods": ["full"]},
        {"methods": ["streaming_llm"], "keep_ratios": [0.5], "awareness": ["agnostic"]},
        {"methods": [{"snapkv": {"window": 16}}], "keep_ratios": [0.25]},
    ]
    recipe = RECIPE | {"cells": cells, "n": 1, "chunk_tokens": 128}
    sweep.run(recipe, tmp_path, loaded=loaded)
    records = {(record["cell"], record["task"]): record for record in lines(tmp_path)}
    assert len(records) == 2 * 4
    for (cell, _), record in records.items():
        if cell != "full":
            assert 0.9 < record["kept_tokens"] / (record["keep_ratio"] * record["tokens_in"]) < 1.05
            assert record["chunks"] > 1
    assert type(loaded[0]) is LlamaForCausalLM


def test_bad_recipes_are_refused(tmp_path):
    with pytest.raises(InputError, match="unknown recipe key lenght"):
        Recipe.read({"lenght": 3})
    with pytest.raises(InputError, match="lacks cells"):
        Recipe.read({key: RECIPE[key] for key in ("name", "model", "length", "n")})
    with pytest.raises(InputError, match="not in"):
        Recipe.read(RECIPE | {"cells": [{"methods": ["truncate"], "keep_ratios": [1.5]}]}).expand()
    with pytest.raises(InputError, match="does not exist"):
        Recipe.read(tmp_path / "none.yaml")


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
import test_sweep as t
from longfit.eval import sweep, tables
sweep.wrapped = lambda m, c, k: t._yield(m if c.method in tables.BASELINES else t.FakeFitted(m, c.keep_ratio))
answer = sweep.answer
sweep.answer = lambda *given: time.sleep(0.05) or answer(*given)
sweep.run(t.RECIPE | {"n": 12}, sys.argv[1], loaded=(t.tiny_model(), t.byte_tokenizer()))
"""


def test_a_killed_process_loses_at_most_the_sample_it_was_at(tmp_path, loaded):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", KILLED, str(tmp_path), os.path.dirname(__file__)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    file, deadline = tmp_path / "samples.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (file.exists() and file.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    finished = {(record["cell"], record["sample"]) for record in tables.read_records(tmp_path)}
    assert len(finished) >= 5
    sweep.run(RECIPE | {"n": 12}, tmp_path, loaded=loaded, limit=2)
    pairs = [(record["cell"], record["sample"]) for record in lines(tmp_path)]
    assert len(pairs) == len(set(pairs)) and finished <= set(pairs)


def record(cell: str, method: str, keep_ratio: float, index: int, correct: float) -> dict:
    return {
        "cell": cell,
        "sample": f"niah_single-{index:04d}",
        "task": "niah_single",
        "method": method,
        "options": {},
        "keep_ratio": keep_ratio,
        "awareness": "agnostic",
        "correct": correct,
        "kept_tokens": 100 * keep_ratio,
        "kv_bytes": 2**20,
        "tokens_in": 100,
        "prefill_seconds": 1.0,
        "seconds": 2.0,
        "cpu_seconds": 2.0,
    }


def test_the_report_shows_rates_intervals_and_paired_differences(tmp_path):
    rows = [record("full", "full", 1.0, i, 1.0) for i in range(20)]
    rows += [record("no_context", "no_context", 1.0, i, 0.0) for i in range(20)]
    rows += [record("toy-25%-agnostic", "toy", 0.25, i, float(i < 10)) for i in range(20)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cell": "to')
    config = {
        **RECIPE,
        "length": 2048,
        "n": 20,
        "seed": 42,
        "haystack": {"source": "noise"},
        "tasks": ["niah_single"],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    text = tables.report(tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    assert "Full cache 100 [84, 100]; no context 0 [0, 16]." in text
    assert "| toy | agnostic | 50 [30, 70] |" in text
    assert "| toy | agnostic | -50 [-70, -24] |" in text
    assert tables.summarise(rows)["toy-25%-agnostic"]["tasks"]["niah_single"]["normalised"] == 0.5
    (tmp_path / "samples.jsonl").write_text("nonsense\n")
    with pytest.raises(InputError, match="line 1 is damaged"):
        tables.report(tmp_path)
    with pytest.raises(InputError, match="not a run folder"):
        tables.report(tmp_path / "none")

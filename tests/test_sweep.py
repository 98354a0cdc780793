"""Sweeps: a killed run resumes, loses nothing and repeats nothing; what was not compressed is an error."""

import json

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from longfit.errors import BudgetExceededError, InputError, ScoreError, UnknownNameError
from longfit.eval import records, shared_answering, sweep, worker
from longfit.eval.answering import Reader, baseline_context, generate
from longfit.eval.cells import Cell, expand
from longfit.eval.inputs import samples_of
from longfit.eval.measures import Held, check_kept
from longfit.eval.recipe import Recipe
from longfit.eval.suites import get_task
from tests.tiny_sweep import CELLS, MODEL, RECIPE, SAMPLES, lines, loaded_tiny, own_cache  # noqa: F401


def test_a_run_fills_the_grid_baselines_first_block_by_block(tmp_path, loaded):
    metrics = sweep.run(RECIPE, tmp_path, loaded=loaded)
    found = lines(tmp_path)
    assert metrics["finished"] == len(found) == CELLS * SAMPLES
    cells = list(dict.fromkeys(record["cell"] for record in found))
    assert cells[:3] == ["full", "no_context", "truncate-50%"]
    assert cells[3] == "snapkv(window=16)-50%-agnostic" and cells[-1] == "snapkv(window=16)-25%-aware"
    assert {record["index"] for record in found[: len(found) // 2]} == {0, 1}
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["conditions"]["tiny@700"]["dtype"] == "float32" and config["decoding"] == "greedy"
    assert json.loads((tmp_path / "env.json").read_text())["versions"]["torch"]
    assert type(loaded[0]) is LlamaForCausalLM


def test_every_line_says_what_was_kept_and_spent(tmp_path, loaded):
    sweep.run(RECIPE | {"n": 1}, tmp_path, loaded=loaded)
    for record in lines(tmp_path):
        whole = record["context_tokens"] + record["question_tokens"]
        if record["method"] == "snapkv":
            assert 0.9 < record["kept_tokens"] / (record["keep_ratio"] * record["tokens_in"]) < 1.05
            assert record["tokens_in"] == (whole if record["awareness"] == "aware" else record["context_tokens"])
        if record["cell"] == "truncate-50%":
            assert record["kept_tokens"] == record["context_tokens"] // 2 + record["question_tokens"]
        if record["cell"] == "full":
            assert record["kept_tokens"] == whole and record["kv_bytes"] == 2 * 1 * 1 * 8 * whole * 4
        if record["cell"] == "no_context":
            assert record["tokens_in"] < record["question_tokens"] + 200
        assert record["peak_bytes"] >= 0 and record["prefill_seconds"] >= 0 and record["new_tokens"] == 2
    kept = lines(tmp_path, "kept")
    assert len(kept) == 2 * 2 and all(len(line["layers"][0]) == 64 for line in kept)
    for line in kept:
        ratio = 0.5 if "50%" in line["cell"] else 0.25
        assert sum(line["layers"][0]) / 64 == pytest.approx(100 * ratio, abs=2)


def test_a_second_start_does_nothing_and_a_cut_line_is_done_again(tmp_path, loaded):
    sweep.run(RECIPE, tmp_path, loaded=loaded, limit=1)
    file = tmp_path / "samples.jsonl"
    before = file.read_bytes()
    sweep.run(RECIPE, tmp_path, loaded=loaded, limit=1)
    assert file.read_bytes() == before
    file.write_bytes(before[:-40])
    assert len(records.read_records(tmp_path)) == 2 * CELLS - 1
    sweep.run(RECIPE, tmp_path, loaded=loaded)
    pairs = [records.key_of(record) for record in lines(tmp_path)]
    assert len(pairs) == len(set(pairs)) == CELLS * SAMPLES


def test_shards_share_a_folder_and_make_the_whole(tmp_path, loaded, monkeypatch):
    sweep.run(RECIPE, tmp_path, loaded=loaded, shard="1/2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    metrics = sweep.run(RECIPE, tmp_path, loaded=loaded)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert metrics["finished"] == CELLS * SAMPLES
    assert sweep.run(RECIPE, tmp_path, loaded=loaded) == metrics
    for bad in ("0/2", "3/2", "x", "1/"):
        with pytest.raises(InputError, match="1/4"):
            sweep.run(RECIPE, tmp_path, loaded=loaded, shard=bad)


def test_shards_split_the_depths_evenly():
    first = [index for index in range(20) if sweep.mine(index, (1, 2))]
    assert len(first) == 10 and {index % 2 for index in first} == {0, 1}


def test_two_sweeps_may_not_write_to_one_folder(tmp_path, loaded):
    with records.locked(tmp_path, ""):
        for shard in (None, "1/2"):
            with pytest.raises(InputError, match="another sweep"):
                sweep.run(RECIPE, tmp_path, loaded=loaded, shard=shard)
    refused = pytest.raises(InputError, match="another sweep")
    with records.locked(tmp_path, "-1of2"), records.locked(tmp_path, "-2of2"), refused:
        sweep.run(RECIPE, tmp_path, loaded=loaded)


def test_a_folder_holds_one_run_but_takes_more_cells_and_tasks(tmp_path, loaded):
    small = RECIPE | {"cells": RECIPE["cells"][1:], "tasks": ["niah_single"]}
    sweep.run(small, tmp_path, loaded=loaded, limit=1)
    with pytest.raises(InputError, match="another seed"):
        sweep.run(RECIPE | {"seed": 1}, tmp_path, loaded=loaded)
    torch.manual_seed(7)
    other = LlamaForCausalLM(loaded[0].config).eval()
    with pytest.raises(InputError, match="weights_sha256 of tiny@700"):
        sweep.run(RECIPE, tmp_path, loaded=(other, loaded[1]))
    assert sweep.run(RECIPE, tmp_path, loaded=loaded, limit=1)["finished"] == 2 * CELLS
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["tasks"] == ["niah_single", "niah_multikey"]
    (tmp_path / "config.yaml").write_text("name: old\n")
    with pytest.raises(InputError, match="format 1"):
        sweep.run(RECIPE, tmp_path, loaded=loaded)


def test_a_cell_that_fails_says_so_the_others_go_on_and_the_next_start_tries_again(tmp_path, loaded, monkeypatch):
    answer = worker.answer

    def broken(reader, task, sample, cell):
        if cell.budget == "25%":
            raise ScoreError("nothing was compressed")
        return answer(reader, task, sample, cell)

    monkeypatch.setattr(worker, "answer", broken)
    with pytest.raises(sweep.SweepError, match=r"2 cells failed.*nothing was compressed"):
        sweep.run(RECIPE, tmp_path, loaded=loaded)
    assert len(lines(tmp_path)) == 5 * SAMPLES
    assert len(lines(tmp_path, "errors")) == 2
    monkeypatch.undo()
    assert sweep.run(RECIPE, tmp_path, loaded=loaded)["finished"] == CELLS * SAMPLES


def test_what_was_not_compressed_or_kept_too_much_is_an_error():
    cell = Cell("toy", "25%")
    with pytest.raises(BudgetExceededError, match="above 25%"):
        check_kept(cell, Held(1000, 300, 1, 1), new_tokens=16)
    with pytest.raises(ScoreError, match="nothing was compressed"):
        check_kept(cell, Held(1000, 1000, 1, 1), new_tokens=16)
    tokens = Cell("toy", "512 tokens")
    check_kept(tokens, Held(400, 400, 1, 1, limit_tokens=512), new_tokens=16)
    with pytest.raises(ScoreError, match="nothing was compressed"):
        check_kept(tokens, Held(1000, 1000, 1, 1, limit_tokens=512), new_tokens=16)
    with pytest.raises(BudgetExceededError, match="above 512 tokens"):
        check_kept(tokens, Held(1000, 600, 1, 1, limit_tokens=512), new_tokens=16)


def test_truncation_keeps_as_much_as_a_method_at_any_kind_of_budget(loaded):
    sample = get_task("needle", "niah_single").samples(loaded[1], length=700, n=1)[0]
    reader, whole = Reader(*loaded), len(sample.context_ids)
    for budget, kept in (("50%", whole // 2), ("100 tokens", 100), ("5000 tokens", whole), (f"{64 * 90}B", 90)):
        context = baseline_context(reader, Cell("truncate", budget), sample)
        assert len(context) == kept
        assert context[:10] == sample.context_ids[:10] and context[-10:] == sample.context_ids[-10:]


def test_a_shared_prefill_gives_the_answers_of_each_cell_alone(tmp_path, loaded):
    recipe = {key: value for key, value in RECIPE.items()} | {"n": 2, "max_new_tokens": 6}
    sweep.run(recipe, tmp_path / "alone", loaded=loaded)
    sweep.run(recipe | {"shared_prefill": True, "cost_samples": 1}, tmp_path / "shared", loaded=loaded)
    alone = {records.key_of(r): r["answer"] for r in lines(tmp_path / "alone")}
    shared = {records.key_of(r): r["answer"] for r in lines(tmp_path / "shared")}
    assert alone == shared
    costs = lines(tmp_path / "shared", "costs")
    assert len(costs) == CELLS and all(r["peak_bytes"] is not None and not r["shared_prefill"] for r in costs)


def test_a_cell_that_fails_in_a_shared_prefill_leaves_the_others(tmp_path, loaded, monkeypatch):
    def broken(cell, held, new_tokens):
        if cell.budget == "25%":
            raise ScoreError("nothing was compressed")

    monkeypatch.setattr(shared_answering, "check_kept", broken)
    with pytest.raises(sweep.SweepError, match="2 cells failed"):
        sweep.run(RECIPE | {"shared_prefill": True}, tmp_path, loaded=loaded)
    assert len(lines(tmp_path)) == 5 * SAMPLES


def test_samples_are_made_once_and_again_when_their_data_change(tmp_path, loaded, monkeypatch):
    task, made = get_task("needle", "niah_single"), []
    original = type(task).samples
    monkeypatch.setattr(type(task), "samples", lambda self, *a, **k: made.append(1) or original(self, *a, **k))
    data = tmp_path / "data"
    data.mkdir()
    (data / "book.txt").write_text("Once upon a time there was a cat. " * 100)
    how = {"length": 900, "n": 2, "data": data, "cache": tmp_path / "cache"}
    first = samples_of(task, loaded[1], **how)
    assert samples_of(task, loaded[1], **how) == first and len(made) == 1
    assert [s.sha256 for s in first] == [s.sha256 for s in original(task, loaded[1], length=900, n=2, data=data)]
    (data / "book.txt").write_text("Another text about dogs. " * 200)
    assert samples_of(task, loaded[1], **how) != first and len(made) == 2
    for file in (tmp_path / "cache").iterdir():
        file.write_text(file.read_text()[:-50])
    samples_of(task, loaded[1], **how)
    assert len(made) == 3


def test_generation_stops_where_the_score_is_settled(loaded):
    class Settled:
        @staticmethod
        def settled(text, sample):
            return len(text) >= 3

    reader = Reader(*loaded, max_new_tokens=20)
    sample = get_task("needle", "niah_single").samples(loaded[1], length=700, n=1)[0]
    outcome = generate(reader, Settled(), sample, reader.tensor(sample.question_ids))
    assert 3 <= outcome.new_tokens < 20 and len(outcome.text) >= 3


def test_bad_recipes_are_refused(tmp_path):
    with pytest.raises(InputError, match="unknown recipe key lenght"):
        Recipe.read({"lenght": 3})
    with pytest.raises(InputError, match="lacks cells"):
        Recipe.read({key: RECIPE[key] for key in ("name", "models", "lengths", "n")})
    with pytest.raises(InputError, match="lengths of the recipe is a list"):
        Recipe.read(RECIPE | {"lengths": 700})
    with pytest.raises(InputError, match="at least one sample"):
        Recipe.read(RECIPE | {"n": 0})
    with pytest.raises(InputError, match="not in"):
        expand([{"methods": ["truncate"], "keep_ratios": [1.5]}])
    with pytest.raises(InputError, match="neither keep_ratios nor budgets"):
        expand([{"methods": ["truncate"]}])
    with pytest.raises(InputError, match="one chunk"):
        Recipe.read(RECIPE | {"shared_prefill": True, "cells": [{"methods": ["knorm"], "chunk_tokens": 8}]})
    with pytest.raises(UnknownNameError, match="niah_single"):
        Recipe.read(RECIPE | {"tasks": ["niah_singel"]}).task_names()
    with pytest.raises(InputError, match="does not exist"):
        Recipe.read(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="is not YAML"):
        Recipe.read(tmp_path / "bad.yaml")

"""Prompt compressors as cells of a sweep, on the command line and in the lists."""

import json

import pytest
import torch
from typer.testing import CliRunner

from longfit.cli import app
from longfit.compressors import available_prompt, get
from longfit.errors import BudgetExceededError, InputError
from longfit.eval import sweep
from longfit.eval.cells import Cell, expand
from longfit.eval.measures import Held, check_kept
from tests.prompt_models import STORY, bpe_tokenizer, prompt_model

RECIPE = {
    "name": "prompts",
    "suite": "needle",
    "models": ["tiny"],
    "tasks": ["niah_single"],
    "lengths": [700],
    "n": 1,
    "max_new_tokens": 3,
    "cells": [
        {"methods": ["truncate", "full"], "keep_ratios": [0.5]},
        {"methods": ["bm25", "llmlingua"], "keep_ratios": [0.5], "budgets": ["200 tokens"]},
        {"methods": [{"llmlingua": {"keep_ratio": 0.4}}]},
        {"methods": ["selective_context"], "keep_ratios": [0.5], "awareness": ["aware"]},
    ],
}


def test_a_sweep_runs_them_at_budgets_and_at_their_own_size(tmp_path):
    metrics = sweep.run(RECIPE, tmp_path, loaded=(prompt_model(), bpe_tokenizer()))
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    by_cell = {line["cell"]: line for line in lines}
    assert set(by_cell) == {
        "full",
        "truncate-50%",
        "bm25-50%-aware",
        "bm25-200tokens-aware",
        "llmlingua-50%-agnostic",
        "llmlingua-200tokens-agnostic",
        "llmlingua(keep_ratio=0.4)-own-agnostic",
        "selective_context-50%-aware",
    }
    assert not metrics["failed"] and metrics["finished"] == 8
    whole = by_cell["full"]["tokens_in"]
    for cell, most in (("bm25-50%-aware", whole * 0.5 + 3), ("bm25-200tokens-aware", 203)):
        assert by_cell[cell]["tokens_in"] == whole and 0.9 * most < by_cell[cell]["kept_tokens"] <= most
    own = by_cell["llmlingua(keep_ratio=0.4)-own-agnostic"]
    assert 0.35 < own["kept_tokens"] / own["context_tokens"] <= 0.4
    maps = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    kept = next(line for line in maps if line["cell"] == "llmlingua-200tokens-agnostic")
    share = sum(kept["layers"][0]) / len(kept["layers"][0]) / 100
    assert share == pytest.approx(200 / kept["tokens"], abs=0.03) and len(set(map(tuple, kept["layers"]))) == 1


def test_cells_say_which_methods_choose_with_the_question():
    modes = {
        cell.method: cell.awareness for cell in expand([{"methods": list(available_prompt()), "budgets": ["9 tokens"]}])
    }
    assert modes == {name: "aware" if kind.query_aware else "agnostic" for name, kind in available_prompt().items()}
    with pytest.raises(InputError, match=r"bm25 chooses with the question in sight only: use awareness: \[aware\]"):
        expand([{"methods": ["bm25"], "keep_ratios": [0.5], "awareness": ["agnostic"]}])
    with pytest.raises(InputError, match="neither keep_ratios nor budgets"):
        expand([{"methods": ["truncate"]}])


def test_what_is_generated_comes_on_top_of_what_a_prompt_became():
    cell = Cell("llmlingua", "200 tokens")
    check_kept(cell, Held(900, 205.0, 1, 1, 200), new_tokens=5)
    with pytest.raises(BudgetExceededError):
        check_kept(cell, Held(900, 206.0, 1, 1, 200), new_tokens=5)
    with pytest.raises(BudgetExceededError):
        check_kept(Cell("snapkv", "200 tokens"), Held(900, 205.0, 1, 1, 200), new_tokens=5)


def test_the_list_has_a_block_of_them():
    rows = {row["name"]: row for row in json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)}
    for name, kind in available_prompt().items():
        assert rows[name]["kind"] == "prompt" and rows[name]["question_aware"] == kind.query_aware
        assert kind.source and kind.summary and kind.scores
    text = CliRunner().invoke(app, ["list", "compressors"]).stdout
    heads = [line for line in text.splitlines() if line.split(" ")[0] in ("KV", "Learned", "Prompt")]
    assert [head.split(":")[0] for head in heads] == ["KV compressors", "Learned compressors", "Prompt compressors"]
    assert text.index("Prompt compressors") < text.index("longllmlingua")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    model = prompt_model()
    model.generation_config.eos_token_id = None
    model.save_pretrained(place)
    bpe_tokenizer().save_pretrained(place)
    (place / "story.txt").write_text(STORY * 12)
    return place


def test_ask_compress_and_plan(folder, tmp_path):
    runner, story = CliRunner(), str(folder / "story.txt")
    common = ["--model", str(folder), "--dtype", "float32"]
    asked = runner.invoke(
        app, ["ask", story, "What is the code?", *common, "-c", "bm25", "-b", "25%", "--max-new-tokens", "3", "--json"]
    )
    assert asked.exit_code == 0, asked.stderr
    report = json.loads(asked.stdout)["report"]
    assert 0.23 < report["prompt_tokens"] / report["tokens_in"] <= 0.25 and report["question_aware"]
    memory = str(tmp_path / "story.ctx")
    how = ["-c", "llmlingua", "--option", "keep_ratio=0.2"]
    assert runner.invoke(app, ["compress", story, "-o", memory, *common, *how]).exit_code == 0
    again = runner.invoke(app, ["ask", memory, "What is the code?", "--max-new-tokens", "3", "--json"])
    assert again.exit_code == 0 and json.loads(again.stdout)["report"]["prompt_tokens"] > 0
    refused = runner.invoke(app, ["compress", story, "-o", str(tmp_path / "b.ctx"), *common, "-c", "bm25"])
    assert refused.exit_code == 2 and "compresses for a question" in refused.stderr
    planned = json.loads(
        runner.invoke(app, ["plan", "-m", str(folder), "-t", "4000", "-c", "bm25", "-b", "25%", "--json"]).stdout
    )
    assert planned["kept_tokens"] == 1000


@pytest.mark.real
def test_the_shipped_probe_finds_the_sentence_that_answers(smollm2):
    model, tokenizer = smollm2
    text = STORY + " The lighthouse was painted white in the spring. Nobody knew the name of the gull."
    made = get("sentinel").bind(model, tokenizer).compress_text(text, "What is the code of the gate?", kept_tokens=30)
    assert "7714" in made.text
    assert not torch.is_grad_enabled() or made.kept_tokens <= 30

"""A learned compressor of the user's own: one file and one recipe, as the guide has them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import longfit
from longfit.compressors import KVCompressor, LearnedCompressor, available
from longfit.compressors.soft import base
from longfit.errors import InputError
from longfit.training import run
from longfit.training.recipe import Recipe
from longfit.user_code import load_code
from tests.tiny_models_on_disk import save_tiny
from tests.tiny_training import write_texts

GUIDE = Path(__file__).parents[1] / "docs" / "training.md"
SMALL = {
    "context_tokens": 64,
    "target_tokens": 48,
    "steps": 2,
    "evaluation": {"n": 0},
    "data": [{"kind": "text", "files": "texts/*.txt"}],
}


def blocks(language: str) -> list[str]:
    section = GUIDE.read_text(encoding="utf-8").partition("## A method of your own\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The guide's two files, the recipe made small, a tiny model and texts."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "averaged.py").write_text(blocks("python")[0], encoding="utf-8")
    save_tiny(folder / "model")
    write_texts(folder / "texts", words=40)
    recipe = yaml.safe_load(blocks("yaml")[0]) | SMALL | {"model": str(folder / "model")}
    (folder / "averaged.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "longfit", *arguments], cwd=folder, capture_output=True, text=True)


def test_the_guides_file_and_recipe_train_and_answer_in_commands_of_their_own(folder):
    trained = command(folder, "train", "averaged.yaml", "--data", ".", "-o", "run", "--json", "--max-seconds", "500")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["steps"] == 2
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["max_seconds"] == 500
    (folder / "text.txt").write_text("abc def ghi " * 20)
    how = ["-m", "model", "-c", "averaged", "--option", "adapter=run/adapter", "--json"]
    made = command(folder, "--code", "averaged.py", "compress", "text.txt", "-o", "text.ctx", *how)
    assert made.returncode == 0, made.stderr
    asked = ["ask", "text.ctx", "a b", "--max-new-tokens", "4", "--json"]
    without = command(folder, *asked)
    assert without.returncode == 2 and "--code FILE" in without.stderr and "averaged" in without.stderr
    answered = command(folder, "--code", "averaged.py", *asked)
    assert answered.returncode == 0, answered.stderr
    assert "answer" in json.loads(answered.stdout)


def test_workers_of_a_sweep_know_it_too(folder):
    recipe = {"name": "s", "models": ["model"], "lengths": [512], "n": 1, "suite": "needle", "chat": False}
    recipe |= {"tasks": ["niah_single"], "cells": [{"methods": [{"averaged": {"adapter": "untrained"}}]}]}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = command(folder, "--code", "averaged.py", "sweep", "sweep.yaml", "-o", "sweep", "--data", "texts")
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "sweep" / "samples.jsonl").read_text().splitlines()[0])
    assert record["method"] == "averaged" and record["kept_tokens"] < record["tokens_in"]


def test_in_python_an_import_is_enough(folder, monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))  # for this test only
    monkeypatch.delitem(sys.modules, "averaged", raising=False)
    load_code(["averaged.py"], beside=folder)
    load_code([folder / "averaged.py"])  # once only
    assert issubclass(available()["averaged"], LearnedCompressor)
    model, tokenizer = longfit.load(str(folder / "model"), progress=False)
    run(folder / "averaged.yaml", folder / "again", data=folder, loaded=(model, tokenizer), quiet=True)
    wrapped = longfit.wrap(model, "averaged", adapter=str(folder / "again" / "adapter"), window_tokens=4)
    memory = wrapped.compress(tokenizer("abc def ghi " * 8, return_tensors="pt").input_ids)
    ids = torch.tensor([[5, 6, 7]])
    assert memory.kept_tokens < 40 < memory.tokens_in
    assert torch.equal(
        wrapped.generate(ids, memory=memory, max_new_tokens=3), wrapped.generate(ids, memory=memory, max_new_tokens=3)
    )


def test_mistakes_are_told(tmp_path):
    with pytest.raises(InputError, match="is not a Python file"):
        load_code(["none.py"])
    (tmp_path / "yaml.py").write_text("")
    with pytest.raises(InputError, match="give it another name"):
        load_code([tmp_path / "yaml.py"])
    (tmp_path / "colorsys.py").write_text("")  # of Python itself, though nothing imported it yet
    with pytest.raises(InputError, match="give it another name"):
        load_code([tmp_path / "colorsys.py"])
    (tmp_path / "broken_method.py").write_text("import nothing_of_that_name")
    for _ in range(2):  # what failed is not taken for loaded
        with pytest.raises(ModuleNotFoundError):
            load_code([tmp_path / "broken_method.py"])
    with pytest.raises(InputError, match="list of files"):
        Recipe.read({"name": "x", "compressor": "gist", "data": [], "steps": 1, "code": "mine.py"})


@pytest.mark.parametrize("kind", [KVCompressor, LearnedCompressor])
def test_a_name_of_longfits_own_is_not_taken_over(kind):
    before = available()["gist"]
    with pytest.raises(InputError, match="longfit's own Gist"):
        type("Mine", (kind,), {"name": "gist"})
    assert available()["gist"] is before

"""kvpress' answers become rows of a run; a stand-in for its process answers here."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from longfit.bench import kvpress_worker
from longfit.errors import InputError
from longfit.eval import records, sweep
from tests.test_needle import byte_tokenizer
from tests.tiny_sweep import RECIPE, own_cache, tiny_model  # noqa: F401

STAND_IN = """
import json, sys
job, number = json.load(open(sys.argv[1])), 0
for line in open(job["samples"]):
    sample = json.loads(line)
    for cell in sample["cells"]:
        if number == BREAKS_AFTER:
            sys.exit(1)
        number += 1
        answer = f"{cell[0]} {job['attention']}"
        record = {"sample": sample["sample"], "cell": cell, "answer": answer, "new_tokens": 1, "kept_tokens": 7}
        print(json.dumps(record | {"kv_bytes": 8, "prefill_seconds": 0.0, "decode_seconds": 0.0}), flush=True)
"""


@pytest.fixture(scope="module")
def compare():
    path = Path(__file__).parents[1] / "recipes" / "kvpress" / "compare.py"
    spec = importlib.util.spec_from_file_location("kvpress_compare", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start(tmp_path, monkeypatch, compare):
    """start(*arguments, breaks_after): one start of compare.py on a recipe whose run is in `tmp_path / "run"`."""
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    recipe = RECIPE | {"models": [str(model)], "cells": [{"methods": ["full"]}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    stand_in = tmp_path / "answer.py"
    monkeypatch.setattr(compare, "ANSWER", stand_in)
    monkeypatch.setenv("LONGFIT_KVPRESS_PYTHON", sys.executable)

    def run(*arguments: str, breaks_after: int = -1, **changes):
        stand_in.write_text(STAND_IN.replace("BREAKS_AFTER", str(breaks_after)))
        if changes:
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))
        command = ["compare.py", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "run"), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        compare.main()

    run.folder, run.recipe = tmp_path / "run", recipe
    return run


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples-kvpress.jsonl").read_text().splitlines()]


def test_its_rows_have_the_fields_and_samples_of_ours(start):
    sweep.run(start.recipe, start.folder, loaded=(tiny_model(), byte_tokenizer()), limit=1)
    start("--presses", "knorm,h2o", "--keep-ratios", "0.5,0.25", "--limit", "1")
    ours = {record["sample"]: record for record in records.read_records(start.folder) if record["cell"] == "full"}
    theirs = rows(start.folder)
    assert [row["cell"] for row in theirs] == [
        f"kvpress:{press}-{kept}-agnostic" for press in ("knorm", "h2o") for _ in (1, 2) for kept in ("50%", "25%")
    ]
    assert {row["answer"] for row in theirs} == {"knorm sdpa", "h2o eager"}
    for row in theirs:
        own = ours[row["sample"]]
        assert set(row) == set(own) and row["sha256"] == own["sha256"] and row["index"] == 0 and row["kept_tokens"] == 7


def test_what_was_answered_before_a_failure_is_not_answered_again(start):
    with pytest.raises(SystemExit, match="11 answers are left"):
        start("--presses", "knorm,snapkv", breaks_after=5)
    before = rows(start.folder)
    start("--presses", "knorm,snapkv")
    assert len(before) == 5 and rows(start.folder)[:5] == before
    assert len({(row["cell"], row["sample"]) for row in rows(start.folder)}) == len(rows(start.folder)) == 16


def test_other_samples_than_those_of_the_run_are_refused(start):
    start("--presses", "knorm", "--limit", "1")
    with pytest.raises(InputError, match="another seed"):
        start("--presses", "knorm", seed=7)
    with pytest.raises(InputError, match="unknown press snapvk"):
        start("--presses", "snapvk")


def test_a_press_that_rotates_its_keys_anew_is_told_from_one_that_does_not():
    class KeyRerotationPress:
        pass

    class FinchPress:
        rerotate_keys = True

    assert kvpress_worker.renumbers(KeyRerotationPress()) and kvpress_worker.renumbers(FinchPress())
    assert not kvpress_worker.renumbers(None) and not kvpress_worker.renumbers(object())

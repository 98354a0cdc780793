"""LongBench-E by length bucket and v2 by difficulty and length, from files in the official formats to the report."""

import csv
import json

import pytest

from longfit.eval import longbench
from longfit.eval.report import report
from longfit.eval.sweep import run
from tests.test_needle import byte_tokenizer
from tests.tiny_sweep import tiny_model

pytest.importorskip("matplotlib")
WORDS = "Paris is a city by a river. " * 40
V1_ROW = {"input": "Which city?", "context": WORDS, "answers": ["Paris"], "all_classes": None, "language": "en"}
V2_ROW = {
    **{"question": "Which?", "choice_A": "a", "choice_B": "b", "choice_C": "c", "choice_D": "d", "answer": "B"},
    **{"context": WORDS, "domain": "Single-Document QA", "sub_domain": "Literary"},
}
CELLS = [{"methods": ["full"]}, {"methods": ["knorm"], "keep_ratios": [0.5, 0.25]}]
SCORES = [1.0, 0.5, 0.0, 0.25]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LONGFIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def reported(tmp_path, suite, files):
    """A run of the suite on `files` (name to rows), its scores replaced by SCORES, in its report."""
    folder = tmp_path / "data" / ("longbench_v2" if suite == "longbench_v2" else "longbench")
    folder.mkdir(parents=True)
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [name.removesuffix(".jsonl") for name in files] if suite != "longbench_v2" else []
    recipe = {"name": suite, "suite": suite, "tasks": tasks, "models": ["tiny"], "lengths": [1600], "n": 4}
    recipe |= {"cells": CELLS, "max_new_tokens": 2, "shared_prefill": True}
    run(recipe, tmp_path / "run", data=tmp_path / "data", loaded=(tiny_model(), byte_tokenizer()))
    log = tmp_path / "run" / "samples.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line | {"score": SCORES[line["index"]]}) + "\n" for line in lines))
    return report(tmp_path / "run")


def table(markdown, heading, number=0):
    """The rows under a heading's table as lists of cells, by (method, budget)."""
    part = markdown.split(f"### {heading}\n")[1].split("\n#")[0]
    lines = [line for line in part.split("\n\n") if line.startswith("|")][number].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return rows[0], {(row[0], row[2]): [cell.split(" ")[0] for cell in row[3:]] for row in rows[2:]}


def test_longbench_e_is_shown_by_length_bucket(tmp_path):
    rows = [{**V1_ROW, "length": words, "_id": str(words)} for words in (3999, 4000, 8000, 9000)]
    found = reported(tmp_path, "longbench_e", {"qasper_e.jsonl": rows, "hotpotqa_e.jsonl": rows[:1]})
    columns, shown = table(found.markdown, "LongBench-E by length in words")
    assert columns[3:] == ["overall", "0-4k", "4-8k", "8k+"]
    assert set(shown) == {("full", "100%"), ("knorm", "50%"), ("knorm", "25%")}
    samples = longbench.generate("qasper_e", byte_tokenizer(), 1600, data=tmp_path / "data")
    wanted = longbench.means_by("bucket", SCORES, samples)
    _, qasper = table(found.markdown, "LongBench-E by length in words", 1)
    assert qasper["knorm", "25%"][1:] == [f"{100 * value:.1f}" for value in wanted.values()]
    _, hotpotqa = table(found.markdown, "LongBench-E by length in words", 2)
    assert hotpotqa["full", "100%"] == ["100.0", "100.0", "", ""]
    assert shown["full", "100%"] == ["71.9", "100.0", "50.0", "12.5"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "LongBench-E by length in words" in page and "<th>4-8k</th>" in page
    with (tmp_path / "run" / "groups.csv").open(newline="") as file:
        flat = {(r["cell"], r["task"], r["group"]): r for r in csv.DictReader(file)}
    row = flat["knorm-25%-agnostic", "qasper_e", "8k+"]
    assert (float(row["score"]), row["n"], row["detail"]) == (0.125, "2", "bucket")
    assert tmp_path / "run" / "groups.csv" in found.files


def test_longbench_v2_is_shown_by_difficulty_and_length(tmp_path):
    kinds = [("easy", "short"), ("hard", "short"), ("hard", "medium"), ("easy", "short")]
    rows = [{**V2_ROW, "_id": str(i), "difficulty": d, "length": length} for i, (d, length) in enumerate(kinds)]
    found = reported(tmp_path, "longbench_v2", {"data.jsonl": rows})
    columns, shown = table(found.markdown, "LongBench v2 by difficulty and length")
    assert columns[3:] == ["overall", "easy", "hard", "short", "medium"]
    assert shown["knorm", "50%"] == ["43.8", "62.5", "25.0", "58.3", "0.0"]
    caption = found.markdown.split("### LongBench v2 by difficulty and length\n")[1].split("|")[0]
    assert "n: overall 4, easy 2, hard 2, short 3, medium 1." in caption


def test_a_run_without_such_a_suite_has_no_groups(tmp_path):
    recipe = {"name": "r", "suite": "needle", "tasks": ["niah_single"], "models": ["tiny"], "lengths": [700], "n": 1}
    run(recipe | {"cells": CELLS, "max_new_tokens": 2}, tmp_path, loaded=(tiny_model(), byte_tokenizer()))
    assert "by length" not in report(tmp_path).markdown and not (tmp_path / "groups.csv").exists()

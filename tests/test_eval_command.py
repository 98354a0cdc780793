"""`longfit eval`, `sweep` and `report` as a user types them, on a tiny model and local files."""

import json

import pytest
from typer.testing import CliRunner

from longfit.cli import app
from longfit.errors import InputError, UnknownNameError
from longfit.eval.command import Asked, recipe_of
from longfit.eval.suites import tasks_of
from longfit.eval.sweep import run
from tests.test_needle import byte_tokenizer
from tests.tiny_sweep import tiny_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    books = folder / "text" / "books"
    books.mkdir(parents=True)
    for name in "ab":
        (books / f"{name}.txt").write_text(f"It was a bright cold day in {name}. " * 200)
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LONGFIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def longfit(*words):
    return CliRunner().invoke(app, list(words))


def test_eval_scores_a_method_beside_its_baselines_and_reports(tmp_path, model_folder):
    words = ["eval", "--suite", "needle", "--tasks", "niah_single", "--length", "700", "-n", "1", "-m", model_folder]
    ran = longfit(*words, "-c", "knorm", "-b", "25%", "-o", str(tmp_path))
    assert ran.exit_code == 0, ran.output
    assert "| knorm | agnostic |" in ran.output and "truncate" in ran.output
    names = {file.name for file in tmp_path.iterdir()}
    assert {"report.md", "report.html", "summary.csv", "metrics.json", "config.yaml", "plots"} <= names
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["cell"] for line in lines] == ["full", "no_context", "truncate-25%", "knorm-25%-agnostic"]
    again = longfit(*words, "-c", "knorm", "-b", "25%", "-o", str(tmp_path), "--json")
    assert json.loads(again.stdout)["finished"] == 4
    compared = longfit("report", str(tmp_path), "--compare", str(tmp_path), "-o", str(tmp_path / "both"))
    assert compared.exit_code == 0, compared.output
    assert (tmp_path / "both" / "report.html").is_file()


def test_perplexity_runs_alone_and_from_a_shared_prefill(tmp_path, model_folder, data):
    recipe = tmp_path / "recipe.json"
    cells = [
        {"methods": ["full", "no_context"]},
        {"methods": ["truncate", "knorm", "kvzip"], "keep_ratios": [0.5], "awareness": ["agnostic"]},
    ]
    given = {"name": "p", "suite": "perplexity", "tasks": ["books"], "models": [model_folder], "lengths": [500], "n": 2}
    values = {}
    for name, more in (("alone", {"fresh_process": False}), ("shared", {"shared_prefill": True})):
        recipe.write_text(json.dumps(given | {"cells": cells} | more))
        ran = longfit("sweep", str(recipe), "-o", str(tmp_path / name), "--data", data)
        assert ran.exit_code == 0, ran.output
        lines = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        values[name] = {(line["cell"], line["sample"]): line["score"] for line in lines}
        assert all(len(line["nll_by_position"]) == 8 and line["higher_is_better"] is False for line in lines)
    assert values["alone"].keys() == values["shared"].keys() and len(values["alone"]) == 5 * 2
    assert all(values["alone"][key] == pytest.approx(values["shared"][key], abs=1e-4) for key in values["alone"])


def test_a_task_that_asks_nothing_has_no_aware_cell(tmp_path, model_folder, data):
    words = ["--suite", "perplexity", "--tasks", "books", "--length", "500", "-n", "1", "-m", model_folder]
    ran = longfit("eval", *words, "-c", "snapkv", "--question", "aware", "--data", data, "-o", str(tmp_path))
    assert ran.exit_code == 1 and "asks no question" in ran.output


TOY = """
from longfit.eval.sample import Sample, make_prompt
from longfit.eval.task import Task


class Capital(Task):
    suite, name, metric = "toy_suite:TASKS", "capital", "match"

    def samples(self, tokenizer, *, length, n, seed=42, data=None, chat=True):
        prompt = make_prompt(tokenizer, "Read.\\n", "Paris is the capital. " * 20, "\\nWhat is it?", chat=chat)
        return [Sample(self.suite, self.name, index, prompt, ("Paris",), max_new_tokens=2) for index in range(n)]

    def score(self, prediction, sample):
        return float(sample.answers[0] in prediction)


TASKS = {"capital": Capital()}
"""


def test_a_task_of_ones_own_is_one_class_in_a_module_of_ones_own(tmp_path, model_folder, monkeypatch):
    (tmp_path / "toy_suite.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = {"name": "toy", "suite": "toy_suite:TASKS", "models": [model_folder], "lengths": [700], "n": 2}
    cells = [{"methods": ["full"]}, {"methods": ["knorm"], "keep_ratios": [0.5]}]
    metrics = run(recipe | {"cells": cells, "shared_prefill": True}, tmp_path / "run")
    assert metrics["finished"] == 4 and metrics["rows"][0]["task"] == "capital"
    for wrong in ("toy_suite:NONE", "no_such_module:TASKS"):
        with pytest.raises(UnknownNameError, match="can be imported"):
            tasks_of(wrong)


def test_options_become_a_recipe():
    recipe = recipe_of(
        Asked(
            "needle", ("niah_single",), lengths=("2k",), compressors=("snapkv",), options={"window": 8}, budgets=("9%",)
        )
    )
    assert recipe.lengths == [2000] or recipe.lengths == [2048]
    assert [cell.cell_id for cell in recipe.expand()] == [
        "full",
        "no_context",
        "truncate-9%",
        "snapkv(window=8)-9%-agnostic",
        "snapkv(window=8)-9%-aware",
    ]
    assert len(recipe_of(Asked("needle", compressors=("full",))).expand()) == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--suite", "rulers"], "did you mean 'ruler'"),
        (["--tasks", "niah_singel_1"], "did you mean 'niah_single_1'"),
        (["-c", "snapvk"], "snapkv"),
        (["--question", "perhaps"], "agnostic, aware or both"),
        (["-b", "lots"], "lots"),
        (["-c", "snapkv,knorm", "--option", "window=3"], "one compressor"),
        (["--suite", "lm-eval"], "needs --tasks"),
        (["--suite", "lm-eval", "--tasks", "x"], "one cell"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_work(tmp_path, words, reason):
    ran = longfit("eval", "-o", str(tmp_path / "run"), *words)
    assert ran.exit_code == 2 and reason in ran.output


def test_tasks_are_listed_by_suite():
    listed = json.loads(longfit("list", "tasks", "--json").stdout)
    names = {row["name"] for row in listed}
    assert {"ruler/qa_2", "longbench/trec", "longbench_e/lcc_e", "longbench_v2/longbench_v2"} <= names
    assert len([name for name in names if name.startswith("ruler/")]) == 13
    assert len([name for name in names if name.startswith("longbench/")]) == 21


def test_an_unknown_length_is_an_input_error():
    with pytest.raises(InputError):
        recipe_of(Asked("needle", lengths=("many",)))

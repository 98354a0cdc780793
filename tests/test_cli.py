"""The command line: what goes to stdout and stderr, and the exit codes."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from longfit.cli import app
from longfit.compressors import available
from tests.tiny_models_on_disk import save_tiny

runner = CliRunner()
DOCUMENT = "the lamp was lit at four. " * 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    return str(folder)


@pytest.fixture
def log(tmp_path) -> str:
    path = tmp_path / "log.txt"
    path.write_text(DOCUMENT)
    return str(path)


def refused(*arguments: str) -> str:
    """The one line on stderr of a command that ends with exit code 2 and says nothing on stdout."""
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_list_names_every_compressor():
    shown = runner.invoke(app, ["list"])
    rows = json.loads(runner.invoke(app, ["list", "--json"]).stdout)
    assert shown.exit_code == 0 and all(name in shown.stdout for name in available())
    assert [row["name"] for row in rows] == list(available())
    assert all(row["summary"] and row["source"] for row in rows)


def test_list_of_models_recipes_and_nonsense():
    assert "smollm2-135m" in runner.invoke(app, ["list", "models"]).stdout
    assert "needle" in runner.invoke(app, ["list", "recipes"]).stdout
    listed = json.loads(runner.invoke(app, ["list", "attention", "--json"]).stdout)
    assert {"topk", "sliding_window"} <= {row["name"] for row in listed}
    assert "phases prefill+decode; stores reachable" in runner.invoke(app, ["list", "attention"]).stdout
    assert "compressors, attention, adapters, models, recipes and tasks" in refused("list", "modles")


def test_plan_needs_no_weights(tiny, tmp_path):
    shutil.copy(f"{tiny}/config.json", tmp_path)
    arguments = ["plan", "-m", str(tmp_path), "--tokens", "10k", "--budget", "1MiB", "--dtype", "float32"]
    made = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert made["tokens"] == 10_000 and made["fits"] and 0 < made["kept_tokens"] < 10_000
    assert made["prefill_peak_bytes"] <= 2**20 and made["kv_full_bytes"] == 10_000 * 2 * 2 * 2 * 16 * 4
    assert "kept per layer" in runner.invoke(app, arguments).stdout


def test_plan_refuses_with_the_budget_that_would_do(tiny):
    said = refused("plan", "-m", tiny, "--tokens", "10k", "--budget", "1KiB", "--json")
    smallest = said.partition("the smallest that would do is ")[2].split()[0]
    assert runner.invoke(app, ["plan", "-m", tiny, "-t", "10k", "-b", smallest]).exit_code == 0


def test_plan_agrees_with_what_the_wrapper_then_does(tiny, log):
    options = ["-m", tiny, "--budget", "200KiB", "--dtype", "float32", "-c", "knorm", "--json"]
    planned = json.loads(runner.invoke(app, ["plan", "--tokens", "530", *options]).stdout)
    asked = json.loads(runner.invoke(app, ["ask", log, "who", "--max-new-tokens", "4", *options]).stdout)
    assert asked["report"]["limit_tokens"] == planned["kept_tokens"]
    assert asked["report"]["chunk_tokens"] == planned["chunk_tokens"]


@pytest.mark.parametrize("extra", [[], ["--agnostic"], ["--option", "kernel_size=3", "--option", "window=16"]])
def test_ask_gives_exactly_one_json_object(tiny, log, extra):
    arguments = ["ask", log, "who lit it", "-m", tiny, "--budget", "25%", "--max-new-tokens", "4", "--json"]
    result = runner.invoke(app, [*arguments, *extra])
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["question"] == "who lit it" and said["document"] == log
    assert said["report"]["kept_tokens"] < 0.3 * said["report"]["tokens_in"]
    assert said["report"]["question_aware"] is ("--agnostic" not in extra)


def test_ask_reads_standard_input_and_reports_on_stderr(tiny):
    arguments = ["ask", "-", "who", "-m", tiny, "--budget", "100 tokens", "--max-new-tokens", "4"]
    result = runner.invoke(app, arguments, input=DOCUMENT)
    assert result.exit_code == 0, result.stderr
    assert "SnapKV" in result.stderr and "SnapKV" not in result.stdout


def test_list_of_adapters_names_what_wrap_takes():
    from longfit.compressors.soft.artifact import shipped_names

    rows = json.loads(runner.invoke(app, ["list", "adapters", "--json"]).stdout)
    assert [row["name"] for row in rows] == shipped_names() and rows[0]["ratios"] == ["4"]


@pytest.mark.parametrize(
    "how", [[], ["-c", "strided_kv", "--option", "ratio=3"], ["-a", "sliding_window", "--option", "window_tokens=64"]]
)
def test_a_document_is_compressed_once_and_asked_again_and_exported(tiny, log, tmp_path, how):
    folder = str(tmp_path / "log.ctx")
    made = runner.invoke(app, ["compress", log, "-o", folder, "-m", tiny, "--json", *how])
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["report"]["kept_tokens"] < json.loads(made.stdout)["report"]["tokens_in"]
    asked = [runner.invoke(app, ["ask", folder, "who lit it", "--max-new-tokens", "4", "--json"]) for _ in range(2)]
    answers = [json.loads(result.stdout)["answer"] for result in asked]
    plain = ["--max-new-tokens", "4", "--agnostic", "--citations", "0"]
    fresh = runner.invoke(app, ["ask", log, "who lit it", "-m", tiny, *plain, *how])
    assert answers[0] == answers[1] == fresh.stdout.strip()
    known = json.loads(runner.invoke(app, ["info", folder, "--json"]).stdout)
    assert known["document"] == log and known["tokens_in"] > known["kept_tokens"]
    out = runner.invoke(app, ["export", folder, "--to", "cartridge", "-o", str(tmp_path / "c"), "--json"])
    assert out.exit_code == 0, out.stderr
    assert "remembers" in refused("ask", folder, "who", "--budget", "25%")
    assert "prompt-embeds" in refused("export", folder, "--to", "cassette", "-o", str(tmp_path / "d"))
    assert "soft slots" in refused("export", folder, "--to", "vllm-prompt-embeds", "-o", str(tmp_path / "d"), "--json")


def test_bad_input_ends_in_one_line_and_exit_code_2(tiny, log, tmp_path):
    binary = tmp_path / "picture.txt"
    binary.write_bytes(b"\x89PNG\0\0")
    assert "did you mean snapkv" in refused("ask", log, "who", "-m", tiny, "-c", "snapvk", "--json")
    assert "64MiB" in refused("ask", log, "who", "-m", tiny, "--budget", "lots")
    assert "both given" in refused("ask", log, "who", "-m", tiny, "--budget", "25%", "--total", "1GiB")
    assert "did you mean" in refused("ask", log[:-1], "who", "-m", tiny)
    assert "picture" in refused("ask", str(binary), "who", "-m", tiny, "--json")
    assert "key=value" in refused("ask", log, "who", "-m", tiny, "--option", "window")
    assert "no option widow" in refused("ask", log, "who", "-m", tiny, "--option", "widow=3")
    assert "window=wide" in refused("ask", log, "who", "-m", tiny, "--option", "window=wide")
    assert "smollm2-135m" in refused("ask", log, "who", "-m", "smolm2-135m")
    assert "--max-new-tokens" in refused("ask", log, "who", "-m", tiny, "--max-new-tokens", "0")
    assert "question is empty" in refused("ask", log, " ", "-m", tiny, "--json")
    assert "not a run folder" in refused("report", str(tmp_path))
    assert "--budgt" in refused("ask", log, "who", "--budgt", "25%")


def test_interruption_is_130(monkeypatch, log):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("longfit.docqa.read_document", interrupt)
    result = runner.invoke(app, ["ask", log, "who"])
    assert result.exit_code == 130 and result.stdout == ""


@pytest.mark.real
def test_the_demo_answers_from_the_middle_of_its_document(smollm2):
    result = runner.invoke(app, ["demo", "--json"])
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["correct"] and said["expected"] not in said["without_document"]
    assert said["report"]["keep_ratio"] <= 0.25 and said["report"]["chunks"] >= 5


def test_train_refuses_a_recipe_in_one_line(tmp_path):
    assert "does not exist" in refused("train", str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("name: x\ncompressor: strided_kv\ndata: []\nsteps: 3\nlearning: 1\n")
    assert "unknown recipe key learning" in refused("train", str(tmp_path / "bad.yaml"))

"""Documents from the command line: several at once, citations with pages, memories that grow, a chat over a pipe."""

import importlib
import io
import json
import os

import pytest
import torch
from typer.testing import CliRunner

import longfit
from longfit.cli import app
from longfit.docqa import Document, Page, compress, outline
from longfit.docqa.outline import duration
from longfit.docqa.shown import progress_bar
from tests.documents import pdf
from tests.test_cli import DOCUMENT, refused
from tests.tiny_models_on_disk import save_tiny, tiny_llama, tiny_tokenizer

runner = CliRunner()
PAGES = ["the lamp was lit at four by the keeper.", "a storm came from the west at nine."]
SHORT = ["--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    return str(folder)


@pytest.fixture
def files(tmp_path) -> list[str]:
    (tmp_path / "log.txt").write_text(DOCUMENT)
    (tmp_path / "log.pdf").write_bytes(pdf(PAGES))
    return [str(tmp_path / "log.txt"), str(tmp_path / "log.pdf")]


def run(*arguments: str, **how):
    result = runner.invoke(app, list(arguments), **how)
    assert result.exit_code == 0, result.stderr
    return result


def test_several_documents_are_asked_at_once_and_cited_by_page(tiny, files):
    result = run("ask", *files, "storm west", "-m", tiny, "--budget", "50%", *SHORT, "--json")
    said = json.loads(result.stdout)
    assert said["document"] == files and said["question"] == "storm west"
    assert "reading 2 documents, 2 pages" in result.stderr and "chunks of" in result.stderr
    cited = {(c["document"], c["page"]) for c in said["citations"]}
    assert ("log.pdf", 2) in cited
    assert all({"quote", "verified", "score", "kept", "start", "end"} <= c.keys() for c in said["citations"])
    assert all(0 <= c["kept"] <= 1 for c in said["citations"])


def test_citations_are_shown_and_can_be_left_out(tiny, files):
    shown = run("ask", files[1], "storm west", "-m", tiny, "--budget", "80%", *SHORT).stdout
    assert "[1] log.pdf, page 2: " in shown and "% kept" in shown and ("not found" in shown or "verified" in shown)
    assert "[1]" not in run("ask", files[1], "storm west", "-m", tiny, "-b", "80%", "--citations", "0", *SHORT).stdout


def test_a_short_document_is_kept_whole_where_nobody_names_a_budget(tiny, files, tmp_path):
    said = json.loads(run("ask", files[1], "storm west", "-m", tiny, *SHORT, "--json").stdout)
    assert said["report"]["keep_ratio"] == 1 and said["report"]["budget"] == "100%"
    folder = str(tmp_path / "short.ctx")
    run("compress", files[1], "-o", folder, "-m", tiny)
    assert json.loads(run("ask", folder, "storm west", *SHORT, "--json").stdout)["report"]["keep_ratio"] == 1
    assert "cannot be met" in runner.invoke(app, ["ask", files[1], "who", "-m", tiny, "--budget", "25%"]).stderr


def test_a_memory_remembers_its_documents_in_another_process(tiny, files, tmp_path):
    folder = str(tmp_path / "log.ctx")
    run("compress", *files, "-o", folder, "-m", tiny, "--json")
    first = json.loads(run("ask", folder, "storm west", *SHORT, "--json").stdout)
    assert {c["document"] for c in first["citations"]} <= {"log.txt", "log.pdf"} and first["citations"]
    for file in files:
        os.unlink(file)
    again = json.loads(run("ask", folder, "storm west", *SHORT, "--json").stdout)
    assert again["citations"] == first["citations"] and again["answer"] == first["answer"]


def test_a_document_is_appended_to_a_memory(tiny, files, tmp_path):
    folder, other = str(tmp_path / "log.ctx"), str(tmp_path / "both.ctx")
    made = json.loads(run("compress", files[0], "-o", folder, "-m", tiny, "--budget", "100 tokens", "--json").stdout)
    grown = json.loads(run("compress", files[1], "--append", folder, "-o", other, "--json").stdout)
    assert grown["report"]["tokens_in"] > made["report"]["tokens_in"] and grown["report"]["kept_tokens"] == 100
    assert json.loads(run("info", folder, "--json").stdout)["tokens_in"] == made["report"]["tokens_in"]
    known = json.loads(run("info", other, "--json").stdout)
    assert known["document"] == files and known["tokens_in"] == grown["report"]["tokens_in"]
    said = json.loads(run("ask", other, "storm west", *SHORT, "--json").stdout)
    assert ("log.pdf", 2) in {(c["document"], c["page"]) for c in said["citations"]}
    run("compress", files[1], "--append", folder)
    assert json.loads(run("info", folder, "--json").stdout)["document"] == files
    assert "remembers" in refused("compress", files[1], "--append", folder, "--budget", "25%")


def test_a_chat_answers_line_by_line_and_leaves_the_memory_alone(tiny, files, tmp_path):
    folder = str(tmp_path / "log.ctx")
    run("compress", *files, "-o", folder, "-m", tiny)
    before = {p.name: p.read_bytes() for p in (tmp_path / "log.ctx").iterdir()}
    alone = run("ask", folder, "storm west", "--citations", "0", *SHORT).stdout.strip()
    lines = "/cite\nstorm west\n\n/cite\n/what\nstorm west\n/info\n/quit\nnever asked\n"
    said = run("chat", folder, *SHORT, input=lines)
    out = said.stdout.splitlines()
    assert "> storm west\n" in said.stderr and "never asked" not in said.stderr
    assert out[0] == "nothing was asked yet"
    assert out.count(alone) == 2 and "[1] log." in "\n".join(out) and any("/quit the end" in line for line in out)
    assert any("Memory(tokens_in=" in line for line in out) and "SnapKV" in "\n".join(out)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "log.ctx").iterdir()}


def test_a_chat_goes_on_after_a_question_that_is_too_long(tiny, files):
    lines = "storm " * 200 + "\nstorm west\n"
    result = run("chat", files[1], "-m", tiny, "--budget", "70 tokens", *SHORT, input=lines)
    out = result.stdout.splitlines()
    assert out[0].startswith("error: the question has") and "70" in out[0] and len(out) == 2
    assert "reading 1 document, 2 pages" in result.stderr


def test_what_cannot_be_done_is_refused_in_one_line(tiny, files, tmp_path):
    folder = str(tmp_path / "log.ctx")
    run("compress", files[0], "-o", folder, "-m", tiny)
    assert "then the question" in refused("ask", "only this")
    assert "-o report.ctx" in refused("compress", files[0])
    assert "holds other files" in refused("compress", files[0], "-o", str(tmp_path), "-m", tiny)
    assert "is a file" in refused("compress", files[0], "-o", files[1], "-m", "no such model, and never looked for")
    assert "stands alone" in refused("ask", folder, files[1], "who")
    assert "standard input is for the questions" in refused("chat", "-")
    assert "holds no memory" in refused("compress", files[0], "--append", str(tmp_path / "none"))
    (tmp_path / "locked.pdf").write_bytes(pdf(["secret"], password="open"))
    assert "password" in refused("ask", str(tmp_path / "locked.pdf"), "who", "-m", tiny)
    long = "storm " * 200
    result = runner.invoke(app, ["ask", files[1], long, "-m", tiny, "--budget", "70 tokens"])
    assert result.exit_code == 2 and "the question has 1," in result.stderr and result.stdout == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("shown", "terminal"), [(True, True), (False, True), (True, False)])
def test_a_bar_follows_the_reading_on_a_terminal_only(shown, terminal, monkeypatch):
    model = longfit.wrap(tiny_llama(), "knorm", budget="24 tokens", chunk_tokens=16)
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    with progress_bar(model, shown):
        model.compress(torch.arange(2, 32).repeat(3)[None])
    assert ("reading" in stderr.getvalue() and "90.0" in stderr.getvalue()) is (shown and terminal)
    assert model.longfit.observer is None


def test_an_outline_says_what_then_happens(tmp_path):
    model, tokenizer = longfit.wrap(tiny_llama(), "snapkv", budget="80 tokens"), tiny_tokenizer()
    documents = [Document("a", "the lamp was lit. " * 80, (Page(1, 0, 700), Page(2, 700, 1440)))]
    said = outline(model, tokenizer, documents)
    assert str(model.longfit.report) == "None"  # nothing was read yet
    memory = compress(model, tokenizer, documents)
    report = model.fit_report
    assert (said.tokens, said.kept_tokens, said.chunk_tokens) == (report.tokens_in, 80, report.chunk_tokens)
    assert said.tokens == memory.tokens_in and said.seconds > 0 and said.full_kv_bytes == report.full_kv_bytes
    assert str(said).startswith("reading 1 document, 2 pages: 1,442 tokens; SnapKV(") and "; about " in str(said)
    assert outline(model, tokenizer, [Document("b", "short")], "who").seconds is None


def test_the_time_grows_with_what_is_attended_to_and_doubles_for_a_method_that_reads_twice(monkeypatch):
    module = importlib.import_module("longfit.docqa.outline")
    monkeypatch.setattr(module, "_seconds_per_token", lambda model, ids: 0.001)
    documents = [Document("a", "the lamp was lit. " * 400)]

    def seconds(method, budget):
        model = longfit.wrap(tiny_llama(), method, budget=budget, chunk_tokens=64)
        return outline(model, tiny_tokenizer(), documents).seconds

    once, more, twice = seconds("snapkv", "80 tokens"), seconds("snapkv", "2000 tokens"), seconds("kvzip", "80 tokens")
    assert twice == 2 * once and once < more


def test_durations_are_said_as_people_say_them():
    assert [duration(s) for s in (0.2, 44.6, 89, 125, 7200)] == ["1 s", "45 s", "89 s", "2 min", "2.0 h"]

"""Reports: every file is there and right, odd runs still report, damage is refused, comparisons pair by sample."""

import csv
import hashlib
import json
import random
import re
import sys

import pytest
import yaml

from longfit.errors import InputError
from longfit.eval.report import compare, report
from longfit.eval.report.figure import colours
from longfit.eval.report.position_plot import perplexity_by_position
from longfit.eval.report.series import pareto
from longfit.eval.report.tables import marked

pytest.importorskip("matplotlib")
MIB = 2**20
ENV = {"versions": {"torch": "2.13.0"}, "device": "cpu", "threads": 1}


def record(cell, method, budget, task, index, score, *, length=4096, awareness="agnostic", options=None, **more):
    ratio = float(budget[:-1]) / 100
    tokens = length - 128
    found = {
        "model": "tiny", "length": length, "cell": cell, "sample": f"{task}-{index:04d}", "suite": "ruler",
        "task": task, "index": index, "method": method, "options": options or {}, "budget": budget,
        "keep_ratio": ratio, "awareness": awareness, "chunk_tokens": None, "metric": "string_match_all",
        "higher_is_better": True, "score": score, "answer": "x", "expected": ["x"], "context_tokens": tokens,
        "question_tokens": 40, "tokens_in": tokens, "kept_tokens": ratio * tokens,
        "kv_bytes": int(ratio * tokens * 23040), "full_kv_bytes": tokens * 23040, "prefill_seconds": 2.0,
        "decode_seconds": 1.0, "new_tokens": 11, "peak_bytes": 600 * MIB, "shared_prefill": False,
        "details": {"depth": (index + 0.5) / 20},
        "sha256": hashlib.sha256(f"{task}{index}{length}".encode()).hexdigest(),
    }  # fmt: skip
    return found | more


def write_run(folder, records, kept=(), env=ENV, **config):
    folder.mkdir(exist_ok=True)
    config = {"format": 2, "name": folder.name, "models": ["tiny"], "n": 20, "seed": 42, "conditions": {}} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "env.json").write_text(json.dumps(env))
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    if kept:
        (folder / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return folder


def cells(methods, budgets, aware=()):
    found = [("full", "full", "100%", "agnostic"), ("no_context", "no_context", "100%", "agnostic")]
    for budget in budgets:
        found.append((f"truncate-{budget}", "truncate", budget, "agnostic"))
        found += [(f"{name}-{budget}-agnostic", name, budget, "agnostic") for name in methods]
        found += [(f"{name}-{budget}-aware", name, budget, "aware") for name in aware]
    return found


def make_records(methods, budgets, tasks, n=20, lengths=(4096,), aware=(), seed=0):
    """Right-or-wrong scores that fall with the budget, by a level of each method and task."""
    rng = random.Random(seed)
    level = {name: 0.25 + 0.7 * i / max(1, len(methods) - 1) for i, name in enumerate(methods)}
    level |= {"full": 1.0, "no_context": 0.0, "truncate": 0.25}
    lines = []
    for length in lengths:
        for cell, method, budget, mode in cells(methods, budgets, aware):
            kept = 1.0 if method in ("full", "no_context") else float(budget[:-1]) / 100
            seconds = 2.0 * (0.6 + 0.7 * level[method])
            for t, task in enumerate(tasks):
                chance = (
                    (1 - t / (2 * len(tasks))) * level[method] * (0.4 + 0.6 * kept) * (1 + 0.15 * (mode == "aware"))
                )
                for index in range(n):
                    score = float(rng.random() < chance)
                    more = {"length": length, "awareness": mode, "prefill_seconds": seconds}
                    lines.append(record(cell, method, budget, task, index, score, **more))
    return lines


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    records = make_records(["snapkv", "tova"], ["50%", "10%"], ["niah", "vt"], aware=["snapkv"])
    for line in records:
        line["nll_by_position"] = [2.0, 1.0]
    layers = [[50] * 64, [10] * 64]
    kept = [{"model": "tiny", "length": 4096, "cell": "snapkv-10%-agnostic", "sample": "a", "layers": layers}]
    folder = write_run(tmp_path_factory.mktemp("runs") / "r", records, kept, chat_template_sha256="abc123")
    return folder, report(folder)


def test_all_files_are_written_and_named(reported):
    folder, found = reported
    names = {str(file.relative_to(folder)) for file in found.files}
    assert {"report.md", "report.html", "summary.csv", "summary.json"} <= names
    for kind in ("quality-bytes", "pareto", "task-bars-10pct", "task-table-50pct", "needle-10pct", "kept-10pct"):
        assert {f"plots/{kind}.png", f"plots/{kind}.svg"} <= names
    assert "plots/perplexity-50pct.svg" in names
    assert all(file.is_file() and file.stat().st_size for file in found.files)
    assert not list(folder.rglob(".*.tmp"))
    pictures = re.findall(r"\]\((plots/[^)]+)\)", found.markdown)
    assert pictures and all((folder / picture).is_file() for picture in pictures)


def test_conditions_come_first_and_are_complete(reported):
    _, found = reported
    top = found.markdown.split("## tiny, 4,096 tokens")[0]
    for said in ("tiny", "4,096", "20 of 20 samples", "42", "abc123", "question-agnostic, question-aware", "2.13.0"):
        assert said in top


def test_the_tables_hold_the_summarys_numbers(reported):
    folder, found = reported
    rows = json.loads((folder / "summary.json").read_text())
    row = next(r for r in rows if r["cell"] == "tova-10%-agnostic" and r["task"] == "mean")
    line = next(line for line in found.markdown.splitlines() if line.startswith("| tova | agnostic |"))
    assert line.endswith(f"{100 * row['score']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}] |")
    with (folder / "summary.csv").open(newline="") as file:
        flat = list(csv.DictReader(file))
    assert [float(r["score"]) for r in flat] == [r["score"] for r in rows]
    assert json.loads(flat[0]["options"]) == rows[0]["options"]


def test_bold_marks_intervals_without_zero():
    assert marked(0.1, 0.02, 0.2, True) == "**+10.0 [+2.0, +20.0]**"
    assert marked(-0.1, -0.2, 0.0, True) == "-10.0 [-20.0, +0.0]"
    assert marked(-0.5, -0.6, -0.4, False, interval=False) == "**-0.500**"


def test_the_page_needs_nothing_else(reported):
    folder, _ = reported
    page = (folder / "report.html").read_text()
    assert "http" not in page and "<script" not in page and "<img" not in page and "<link" not in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert page.count("<svg") == len(list((folder / "plots").glob("*.svg")))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_the_same_run_gives_the_same_bytes(reported, tmp_path):
    folder, first = reported
    second = report(folder, tmp_path / "again")
    for file in first.files:
        assert (tmp_path / "again" / file.relative_to(folder)).read_bytes() == file.read_bytes(), file.name
    assert second.markdown == first.markdown


@pytest.mark.parametrize(
    ("keep", "lengths", "tasks"),
    [
        (lambda r: r["method"] == "full", (4096,), ["niah"]),
        (lambda r: r["method"] == "tova", (4096,), ["niah"]),
        (lambda r: r["method"] == "tova" and r["budget"] == "10%", (4096,), ["niah", "vt"]),
        (lambda r: r["method"] not in ("full", "no_context"), (2048, 4096, 8192), ["niah", "vt"]),
        (lambda r: r["method"] not in ("truncate", "snapkv"), (4096,), ["niah"]),
    ],
    ids=["only full", "one method, one task, no full", "one cell", "three lengths, no full", "no truncation"],
)
def test_partial_runs_still_report(tmp_path, keep, lengths, tasks):
    records = make_records(["snapkv", "tova"], ["50%", "10%"], tasks, n=4, lengths=lengths)
    found = report(write_run(tmp_path / "r", [line for line in records if keep(line)]))
    assert found.markdown.startswith("# r\n") and "nan" not in found.markdown and "None" not in found.markdown
    if len(lengths) > 1:
        assert all(f"## tiny, {length:,} tokens" in found.markdown for length in lengths)
        assert "Minus full" not in found.markdown


def test_likelihoods_are_not_shown_as_per_cent_nor_averaged_with_scores(tmp_path):
    records = make_records(["tova"], ["50%"], ["niah"], n=4)
    nll = [
        line | {"task": "nll", "sample": "nll" + line["sample"], "score": 2.5, "higher_is_better": False}
        for line in records
    ]
    found = report(write_run(tmp_path / "r", records + nll))
    assert "2.500" in found.markdown and "250" not in found.markdown
    assert "No mean over tasks" in found.markdown


def test_runs_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match="no config"):
        report(tmp_path)
    with pytest.raises(InputError, match="no finished sample"):
        report(write_run(tmp_path / "empty", []))
    folder = write_run(tmp_path / "damaged", make_records(["tova"], ["50%"], ["niah"], n=2))
    (folder / "kept.jsonl").write_text('{"layers": [[1, 2], [3]]}\n')
    with pytest.raises(InputError, match=r"kept\.jsonl line 1"):
        report(folder)
    (folder / "kept.jsonl").unlink()
    (folder / "samples.jsonl").write_text('{"broken\n')
    with pytest.raises(InputError, match=r"samples\.jsonl line 1"):
        report(folder)
    old = write_run(tmp_path / "old", [{"model": "m", "length": 1, "cell": "c", "sample": "s", "task": "t"}])
    with pytest.raises(InputError, match="format 2"):
        report(old)


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = write_run(tmp_path / "r", make_records(["tova"], ["50%"], ["niah"], n=2))
    with pytest.raises(InputError, match=r'pip install "longfit\[eval\]"'):
        report(folder)


def test_the_pareto_front_holds_what_nothing_beats():
    points = [(1.0, 10.0), (2.0, 9.0), (2.0, 20.0), (3.0, 20.0), (4.0, 30.0)]
    assert pareto(points) == [0, 2, 4]


def test_fifty_methods_look_different():
    looks = colours([f"m{i}" for i in range(50)])
    assert len(set(looks.values())) == 50


def test_perplexity_is_averaged_in_nats_over_relative_positions():
    found = perplexity_by_position([[0.0, 2.0], [0.0, 0.0, 4.0, 4.0]])
    assert found == pytest.approx([1.0, 2.718281828 ** (10 / 3)])


def test_a_comparison_names_the_changed_conditions_first_and_pairs_by_sample(tmp_path):
    ours = make_records(["tova"], ["50%"], ["niah", "vt"], n=10)
    theirs = [line | {"score": 1.0} if line["method"] == "tova" else dict(line) for line in ours]
    for line in theirs:
        if line["task"] == "vt" and line["index"] == 0:
            line["sha256"] = "another prompt"
    a = write_run(tmp_path / "a", ours)
    b = write_run(tmp_path / "b", theirs, env=ENV | {"threads": 8}, seed=43)
    found = compare(a, b, tmp_path / "out")
    top = found.markdown.split("## Shared cells")[0]
    assert "| config seed | 42 | 43 |" in top and "| env threads | 1 | 8 |" in top and "device" not in top
    rows = {(r["cell"], r["task"]): r for r in json.loads((tmp_path / "out" / "summary.json").read_text())}
    tova = rows["tova-50%-agnostic", "vt"]
    expected = [1 - r["score"] for r in ours if r["cell"] == "tova-50%-agnostic" and r["task"] == "vt" and r["index"]]
    assert tova["pairs"] == 9 and tova["difference"] == pytest.approx(sum(expected) / 9)
    assert rows["full", "mean"]["difference"] == 0 and rows["full", "mean"]["pairs"] == 19
    assert (tmp_path / "out" / "plots" / "differences.svg").is_file()


def test_runs_without_a_shared_sample_stand_side_by_side_without_a_difference(tmp_path):
    ours = make_records(["tova"], ["50%"], ["niah"], n=3)
    theirs = [line | {"model": "other", "sha256": "b" + line["sha256"]} for line in ours]
    a, b = write_run(tmp_path / "a", ours), write_run(tmp_path / "b", theirs)
    compare(a, b, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert rows and all(row["difference"] is None and row["model"] == "tiny / other" for row in rows)
    with pytest.raises(InputError, match="share no cell"):
        compare(a, write_run(tmp_path / "c", [line | {"length": 1} for line in theirs]), tmp_path / "none")

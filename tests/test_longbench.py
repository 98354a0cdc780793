"""LongBench: official prompts, official cuts, official scores."""

import json
import zipfile
from pathlib import Path

import pytest

from longfit.errors import DataError, InputError, UnknownNameError
from longfit.eval import longbench
from longfit.eval.longbench import data as longbench_data
from longfit.eval.longbench.prompts import TEMPLATES, V2_TEMPLATE, fill, fill_v2, shorten
from longfit.eval.longbench.tasks import PLAIN
from tests.shared_data import shared_data
from tests.test_needle import byte_tokenizer

GOLDEN = Path(__file__).parent / "fixtures" / "longbench" / "metric_golden.json"
WORDS = " ".join(f"Sentence {i} of the {{input}} text — 第{i}句。" for i in range(40))
V1_ROW = {"input": "Where {context}?", "context": WORDS, "answers": ["Paris", "Rome"], "length": 4000, "_id": "r"}
V2_ROW = {
    **{"question": " Which $C_A$? ", "choice_A": "a", "choice_B": "$C_D$ b", "choice_C": "c", "choice_D": "d"},
    **{"answer": "B", "context": f"\n{WORDS} $Q$\n", "difficulty": "hard", "length": "short", "_id": "q"},
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def official_cut(tokenizer, prompt, max_length):
    """LongBench/pred.py, get_pred."""
    tokenized_prompt = tokenizer(prompt, truncation=False, return_tensors="pt").input_ids[0]
    if len(tokenized_prompt) > max_length:
        half = int(max_length / 2)
        prompt = tokenizer.decode(tokenized_prompt[:half], skip_special_tokens=True) + tokenizer.decode(
            tokenized_prompt[-half:], skip_special_tokens=True
        )
    return prompt


def official_v2_prompt(item):
    """pred.py, get_pred."""
    prompt = V2_TEMPLATE.replace("$DOC$", item["context"].strip()).replace("$Q$", item["question"].strip())
    for letter in "ABCD":
        prompt = prompt.replace(f"$C_{letter}$", item[f"choice_{letter}"].strip())
    return prompt


def official_v2_cut(tokenizer, prompt, max_len):
    """pred.py, query_llm."""
    input_ids = tokenizer.encode(prompt)
    if len(input_ids) > max_len:
        input_ids = input_ids[: max_len // 2] + input_ids[-max_len // 2 :]
        prompt = tokenizer.decode(input_ids, skip_special_tokens=True)
    return prompt


def write(folder: Path, name: str, *rows) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


def mismatches(rows, key):
    given = [(longbench.score(row[key], row["prediction"], row["answers"], row["all_classes"]), row) for row in rows]
    return [(score, row) for score, row in given if score != row["score"]]


def test_scores_are_the_originals_on_predictions_made_to_differ():
    rows = json.loads(GOLDEN.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 741 and not mismatches(rows, "task")


def test_scores_are_the_originals_on_real_predictions():
    rows = json.loads(shared_data("longbench", "_metric_golden.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 237 and not mismatches(rows, "dataset")


def test_every_task_is_there_with_its_metric_and_length():
    assert list(longbench.TASKS) == list(TEMPLATES) and len(longbench.TASKS) == 21
    assert len(longbench.E_TASKS) == 13 and {task.suite for task in longbench.E_TASKS.values()} == {"longbench_e"}
    assert longbench.V2_TASKS["longbench_v2"].chance == 0.25
    assert longbench.TASKS["repobench-p"].metric == "code_sim" and longbench.E_TASKS["lcc_e"].name == "lcc_e"


@pytest.mark.parametrize("task", TEMPLATES)
def test_the_parts_join_to_the_official_prompt(task, tokenizer, tmp_path):
    row = {**V1_ROW, "all_classes": ["x"]}
    official = TEMPLATES[task].format(**row)
    sample = longbench.generate(task, tokenizer, 100_000, data=write(tmp_path, f"{task}.jsonl", row), chat=False)[0]
    assert sample.prompt.context + sample.prompt.question == official
    assert sample.prompt.context.endswith(row["context"])
    assert tokenizer.decode(sample.prompt.empty_ids) == TEMPLATES[task].split("{context}")[0]
    assert tokenizer.decode(sample.prompt_ids) == official
    assert sample.answers == ("Paris", "Rome") and sample.details["truncated"] is False


@pytest.mark.parametrize("task", TEMPLATES)
@pytest.mark.parametrize("length", [1300, 1901, 2002])
def test_a_long_prompt_is_cut_as_the_original_cuts_it(task, length, tokenizer):
    row = {**V1_ROW, "input": "Which city?"}
    parts = shorten(tokenizer, fill(task, row), length)
    question = fill(task, row).tail
    assert parts.question_cut == (len(tokenizer(question)["input_ids"]) > (length - 500) // 2)
    assert parts.question_cut or parts.tail == question
    assert parts.text == official_cut(tokenizer, TEMPLATES[task].format(**row), length - 500)
    assert parts.truncated


def test_a_question_that_the_cut_reaches_is_what_follows_the_cut(tokenizer):
    row = {**V1_ROW, "input": "long question " * 100}
    parts = shorten(tokenizer, fill("lsht", row), 1001)
    assert parts.question_cut and parts.text == official_cut(tokenizer, TEMPLATES["lsht"].format(**row), 501)
    assert len(parts.tail) == 250 and parts.head == TEMPLATES["lsht"].split("{context}")[0]


@pytest.mark.parametrize("task", ["hotpotqa", "dureader", "trec", "repobench-p"])
def test_real_rows_are_cut_as_the_original_cuts_them(task, tokenizer):
    folder = shared_data("longbench", f"{task}.jsonl").parent.parent
    samples = longbench.generate(task, tokenizer, 4000, n=3, data=folder, chat=False)
    rows = longbench_data.load_rows(task, folder)[:3]
    assert len(samples) == 3
    for sample, row in zip(samples, rows, strict=True):
        official = official_cut(tokenizer, TEMPLATES[task].format(**row), 3500)
        assert sample.prompt.context + sample.prompt.question == official


def test_a_length_below_the_instruction_is_refused(tokenizer):
    for length in (400, 501, 520):
        with pytest.raises(InputError, match=f"length {length}"):
            shorten(tokenizer, fill("qasper", V1_ROW), length)


def test_six_tasks_are_never_put_into_a_chat_template(tokenizer, tmp_path):
    for task in TEMPLATES:
        folder = write(tmp_path, f"{task}.jsonl", {**V1_ROW, "all_classes": ["x"]})
        sample = longbench.generate(task, tokenizer, 100_000, data=folder)[0]
        assert sample.prompt.context.startswith("<|start|>") == (task not in PLAIN)
    assert len(PLAIN) == 6


def test_rows_come_in_file_order_and_keep_their_number(tokenizer, tmp_path):
    folder = write(tmp_path / "longbench", "qasper_e.jsonl", *({**V1_ROW, "length": k} for k in (3999, 4000, 8000)))
    samples = longbench.generate("qasper_e", tokenizer, 100_000, data=tmp_path)
    assert [sample.details["bucket"] for sample in samples] == ["0-4k", "4-8k", "8k+"]
    assert longbench.generate("qasper_e", tokenizer, 100_000, n=2, seed=7, data=folder) == samples[:2]
    assert longbench.means_by("bucket", [1.0, 0.5, 0.0], samples) == {"0-4k": 1.0, "4-8k": 0.5, "8k+": 0.0}
    with pytest.raises(InputError, match="n is 0"):
        longbench.generate("qasper_e", tokenizer, n=0, data=tmp_path)


def test_an_answer_is_settled_once_nothing_can_change_its_score(tokenizer, tmp_path):
    def settled(task, text):
        return longbench.TASKS[task].settled(text, sample)

    row = {**V1_ROW, "all_classes": ["City"]}
    sample = longbench.generate("trec", tokenizer, 100_000, data=write(tmp_path, "trec.jsonl", row))[0]
    for task in ("trec", "triviaqa", "samsum", "lsht"):
        assert settled(task, "\n\nCity\n") and not settled(task, "\n\nCity") and not settled(task, "\n\n")
    assert settled("lcc", "# why\nreturn x\n") and not settled("lcc", "# why\n") and not settled("lcc", "\nreturn x")
    assert not settled("hotpotqa", "Paris\n\n")
    v2 = longbench.V2_TASKS["longbench_v2"]
    assert v2.settled("The correct answer is **(B)", sample) and not v2.settled("The correct answer is B", sample)


def test_classes_and_references_reach_the_metric(tokenizer, tmp_path):
    row = {**V1_ROW, "answers": ["City"], "all_classes": ["City", "Date"]}
    sample = longbench.generate("trec", tokenizer, 100_000, data=write(tmp_path, "trec.jsonl", row))[0]
    assert longbench.TASKS["trec"].score("\nCity or Date\nCity", sample) == 0.5
    with pytest.raises(InputError, match="all_classes"):
        longbench.score("trec", "City", ["City"])
    with pytest.raises(DataError, match="seven"):
        longbench.score("passage_retrieval_en", "7", ["seven"])
    assert longbench.score("hotpotqa", "Paris", []) == 0.0


def test_v2_reads_the_official_prompt_and_cuts_it_officially(tokenizer, tmp_path):
    assert fill_v2(V2_ROW).text == official_v2_prompt(V2_ROW)
    for length in (1200, 1501, 1502, 1503, 1504, 1505):
        parts = shorten(tokenizer, fill_v2(V2_ROW), length, halves_apart=False)
        assert parts.text == official_v2_cut(tokenizer, official_v2_prompt(V2_ROW), length - 500)
        assert parts.tail == fill_v2(V2_ROW).tail and parts.truncated
    sample = longbench.generate(
        "longbench_v2", tokenizer, 100_000, data=write(tmp_path, "a.jsonl", V2_ROW), chat=False
    )[0]
    assert sample.prompt.context + sample.prompt.question == official_v2_prompt(V2_ROW)
    assert (sample.details["difficulty"], sample.details["length_category"]) == ("hard", "short")
    assert longbench.V2_TASKS["longbench_v2"].score("The correct answer is (B)", sample) == 1.0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct answer is (C).", "C"),
        ("**The correct answer is** *(C)*", "C"),
        ("The correct answer is A, no: The correct answer is (C)", "C"),
        ("The correct answer is C", "C"),
        ("(C)", None),
        ("the correct answer is (C)", None),
        ("", None),
    ],
)
def test_v2_answers_are_read_by_the_official_expressions(text, letter):
    assert longbench.extract_answer(text) == letter
    assert longbench.score("longbench_v2", text, ["C"]) == float(letter == "C")
    assert longbench.compensated(text, ["C"]) == (1.0 if letter else 0.25)


def test_v2_takes_every_file_that_holds_contexts(tmp_path):
    write(tmp_path / "longbench_v2", "b.jsonl", V2_ROW, {**V2_ROW, "_id": "p"})
    write(tmp_path / "longbench_v2", "a.jsonl", V2_ROW)
    write(tmp_path / "longbench_v2", "questions_no_context.jsonl", {"question": "?"})
    assert [row["_id"] for row in longbench_data.load_v2_rows(tmp_path)] == ["q", "p"]
    (tmp_path / "longbench_v2" / "data.json").write_text(json.dumps([{**V2_ROW, "_id": "whole"}]))
    assert [row["_id"] for row in longbench_data.load_v2_rows(tmp_path)] == ["whole"]


def test_rows_are_read_from_the_original_archive_and_from_the_mirrors_parquet(tmp_path):
    row = {**V1_ROW, "context": "one\u2028row", "all_classes": None}
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper_e.jsonl", json.dumps(row, ensure_ascii=False))
    assert longbench_data.load_rows("qasper_e", tmp_path) == [row]
    with pytest.raises(DataError, match=r"no lcc\.jsonl"):
        longbench_data.load_rows("lcc", tmp_path)
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    mirrored = {("question" if key == "input" else key): value for key, value in row.items()}
    (tmp_path / "lcc").mkdir()
    parquet.write_table(arrow.Table.from_pylist([mirrored]), tmp_path / "lcc" / "test-00000.parquet")
    (read,) = longbench_data.load_rows("lcc", tmp_path)
    assert all(read[key] == value for key, value in row.items())


def test_broken_files_are_named_with_the_line(tmp_path):
    (tmp_path / "lcc.jsonl").write_text(json.dumps(V1_ROW) + "\n\n{broken\n")
    with pytest.raises(DataError, match=r"lcc\.jsonl, line 3 is not JSON"):
        longbench_data.load_rows("lcc", tmp_path)
    write(tmp_path, "trec.jsonl", {key: value for key, value in V1_ROW.items() if key != "answers"})
    with pytest.raises(DataError, match=r"trec\.jsonl, line 1: field 'answers' should be list"):
        longbench_data.load_rows("trec", tmp_path)
    (tmp_path / "data.zip").write_text("no zip")
    with pytest.raises(DataError, match=r"data\.zip is broken"):
        longbench_data.load_rows("qasper", tmp_path)
    (tmp_path / "qmsum.parquet").write_text("no table")
    with pytest.raises(DataError, match=r"qmsum\.parquet is not a parquet file"):
        longbench_data.load_rows("qmsum", tmp_path)
    (tmp_path / "vcsum.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"vcsum\.jsonl is empty"):
        longbench_data.load_rows("vcsum", tmp_path)
    (tmp_path / "samsum.jsonl").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"samsum\.jsonl is not UTF-8"):
        longbench_data.load_rows("samsum", tmp_path)
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(DataError, match="list of questions"):
        longbench_data.load_v2_rows(tmp_path)


def test_missing_data_says_what_to_put_where(tmp_path):
    with pytest.raises(DataError, match=r"holds no lcc\.jsonl: put LongBench's .* or into its folder longbench"):
        longbench_data.load_rows("lcc", tmp_path)
    with pytest.raises(DataError, match=r"data\.json of huggingface\.co/datasets/THUDM/LongBench-v2"):
        longbench_data.load_v2_rows(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        longbench_data.load_rows("lcc", tmp_path / "nowhere")


def test_without_a_folder_the_public_files_are_fetched(tmp_path, monkeypatch):
    asked = []

    def download(repo, file, repo_type):
        asked.append((repo, file, repo_type))
        if not (tmp_path / file).exists():
            raise ConnectionError("no route")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(DataError, match=r"could not be downloaded .*no route.*lcc\.jsonl"):
        longbench_data.load_rows("lcc")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/lcc.jsonl", json.dumps(V1_ROW))
    (tmp_path / "data.json").write_text(json.dumps([V2_ROW]))
    assert longbench_data.load_rows("lcc") == [V1_ROW] and longbench_data.load_v2_rows() == [V2_ROW]
    assert set(asked) == {("THUDM/LongBench", "data.zip", "dataset"), ("THUDM/LongBench-v2", "data.json", "dataset")}


def test_an_unknown_task_is_answered_with_the_nearest(tokenizer):
    with pytest.raises(UnknownNameError, match="hotpotqa"):
        longbench.generate("hotpot_qa", tokenizer)
    with pytest.raises(UnknownNameError, match="did you mean 'qasper'"):
        longbench.score("qaspr", "", [""])

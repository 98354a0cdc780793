"""RULER: the texts and references are those of NVIDIA's generators, the length holds, the scores are the official."""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from longfit.errors import DataError, InputError, UnknownNameError
from longfit.eval import ruler
from longfit.eval.ruler import downloads, inputs
from longfit.eval.ruler.words import Pairs
from tests.shared_data import shared_data
from tests.test_needle import TEMPLATE, byte_tokenizer

FIXTURES = Path(__file__).parent / "fixtures" / "ruler"
OWN_TEXT = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")


def recorded(name: str) -> dict[str, dict[str, list[str]]]:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def cases(name: str) -> list[tuple[str, int]]:
    return [(task, int(length)) for task, rows in recorded(name).items() for length in rows if rows[length]]


def fingerprint(sample) -> str:
    held = [sample.prompt.context + sample.prompt.question, list(sample.answers)]
    return hashlib.sha256(json.dumps(held, ensure_ascii=False).encode()).hexdigest()


def check_agreement(fixture: str, task: str, length: int, tokenizer, chat: bool) -> None:
    expected = recorded(fixture)[task][str(length)]
    data = None if task in OWN_TEXT else shared_data("ruler")
    samples = ruler.generate(task, tokenizer, length=length, n=len(expected), data=data, chat=chat)
    assert [fingerprint(sample) for sample in samples] == expected
    assert all(len(sample.prompt_ids) + sample.max_new_tokens <= length for sample in samples)


@pytest.fixture(scope="module")
def word_tokenizer():
    """A token a word or a run of punctuation, without a chat template."""
    return AutoTokenizer.from_pretrained(FIXTURES / "tokenizer")


@pytest.mark.parametrize(("task", "length"), cases("words"))
def test_samples_are_the_originals(word_tokenizer, task, length) -> None:
    check_agreement("words", task, length, word_tokenizer, chat=False)


@pytest.mark.real
@pytest.mark.parametrize(
    ("fixture", "task", "length"),
    [(name, *case) for name in ("smollm2_chat", "smollm2_base") for case in cases(name)],
)
def test_samples_are_the_originals_with_a_real_tokenizer(fixture, task, length) -> None:
    from longfit.packaged import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder("smollm2-135m", progress=False))
    check_agreement(fixture, task, length, tokenizer, chat=fixture == "smollm2_chat")


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "vt", "cwe", "fwe"])
def test_the_context_ends_before_the_question_and_its_length_holds_in_a_chat_template(word_tokenizer, task) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    for sample in ruler.generate(task, tokenizer, length=2048, n=3):
        assert sample.prompt.context.startswith("<|start|>user\n") and sample.prompt.context.endswith("\n")
        assert sample.prompt.question.startswith(("What ", "Question: "))
        ending, prefix = sample.prompt.question.split("<|end|>\n<|start|>assistant\n")
        assert ending and prefix.startswith((" The ", " Answer:"))
        assert 1800 < len(sample.prompt_ids) + sample.max_new_tokens <= 2048


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_3"])
def test_needle_spans_hold_the_asked_needle(task) -> None:
    tokenizer = byte_tokenizer()
    for sample in ruler.generate(task, tokenizer, length=6000, n=3):
        ((start, stop),) = sample.details["needle_tokens"]
        needle = tokenizer.decode(sample.context_ids[start:stop])
        assert needle.startswith("One of the special magic") and needle.endswith(f"{sample.answers[0]}.")
        assert 0 <= sample.details["depth"] <= 1
        assert start / len(sample.context_ids) == pytest.approx(sample.details["depth"], abs=0.1)


def test_the_chat_template_keeps_its_words(word_tokenizer) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizer")
    tokenizer.chat_template = "You are. " + TEMPLATE
    (sample,) = ruler.generate("niah_single_1", tokenizer, length=2048, n=1)
    assert sample.prompt.context.startswith("You are. <|start|>user\nA special magic number is hidden")


@pytest.mark.parametrize("task", OWN_TEXT)
def test_a_length_that_cannot_be_met_ends_in_an_error_that_names_one(word_tokenizer, task) -> None:
    with pytest.raises(InputError, match=r"does not fit into 200 tokens.*needs (about|at least) [1-9]\d\d"):
        ruler.generate(task, word_tokenizer, length=200, n=1)


def test_what_does_not_fit_when_cut_takes_a_smaller_haystack_and_leaves_later_samples(word_tokenizer) -> None:
    """A tokenizer that adds an opening token to a plain text makes the prompt one token longer than the original's."""

    class Opened:
        is_fast, chat_template = False, None

        def __call__(self, text, add_special_tokens=True, **how):
            ids = word_tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [0] * 40 * add_special_tokens + ids}

    plain = ruler.generate("niah_single_1", word_tokenizer, length=2048, n=3)
    opened = ruler.generate("niah_single_1", Opened(), length=2048, n=3)
    for ours, theirs in zip(opened, plain, strict=True):
        assert len(ours.prompt_ids) + 128 <= 2048 and ours.answers == theirs.answers
        assert len(ours.prompt.context) < len(theirs.prompt.context)


def test_scores_are_the_official_ones() -> None:
    assert ruler.score("vt", " abc, x\x01DEF ", ["ABC", "def", "ghi", "jkl"]) == 0.5
    assert ruler.score("qa_1", "It was denver broncos.", ["Denver Broncos", "The Broncos"]) == 1.0
    assert ruler.score("qa_2", "no idea", ["yes"]) == 0.0
    with pytest.raises(UnknownNameError, match="did you mean 'niah_single_1'"):
        ruler.score("niah_singel_1", "", ["a"])


def test_an_answer_is_settled_once_all_that_counts_is_found(word_tokenizer) -> None:
    task = ruler.TASKS["vt"]
    (sample,) = task.samples(word_tokenizer, length=2048, n=1)
    assert not task.settled(" ".join(sample.answers[:4]), sample) and task.settled(" ".join(sample.answers), sample)


def test_the_suite_has_rulers_thirteen_tasks() -> None:
    assert list(ruler.TASKS) == list(recorded("words"))
    metrics = {name: task.metric for name, task in ruler.TASKS.items()}
    assert {name for name, metric in metrics.items() if metric == "string_match_part"} == {"qa_1", "qa_2"}


def test_pairs_are_the_sorted_set_of_all_pairs() -> None:
    adjectives, nouns = ["b", "a", "a-b", "ab", "b", "a-"], ["x", "b-x", "y", "x", "-x"]
    whole = sorted({f"{a}-{n}" for a, n in itertools.product(adjectives, nouns)})
    assert list(Pairs(adjectives, nouns)) == whole and len(Pairs(adjectives, nouns)) == len(whole)


def squad_file(folder: Path, questions: int) -> None:
    asked = [
        {"question": f"Who is {i}?", "is_impossible": i == 1, "answers": [{"text": f"Name {i}"}]}
        for i in range(questions)
    ]
    paragraphs = [{"context": f"Paragraph {i} has a few words.", "qas": asked if i == 0 else []} for i in range(30)]
    (folder / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))


def test_public_formats_are_read_and_questions_end_where_the_data_do(word_tokenizer, tmp_path) -> None:
    squad_file(tmp_path, 3)
    samples = ruler.generate("qa_1", word_tokenizer, length=512, n=9, data=tmp_path)
    assert [sample.answers for sample in samples] == [("Name 0",), ("Name 2",)]
    assert all("Paragraph 0 has" in sample.prompt.context for sample in samples)
    assert "Who is 2?" in samples[1].prompt.question and "Who is" not in samples[1].prompt.context
    rows = [{"question": "Q?", "answer": "A", "context": [[f"Title {i}", ["One. ", "Two."]] for i in range(10)]}]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(rows))
    (sample,) = ruler.generate("qa_2", word_tokenizer, length=512, n=1, data=tmp_path)
    assert "Title 3\nOne. Two." in sample.prompt.context


def test_missing_and_broken_files_are_named(word_tokenizer, tmp_path, monkeypatch) -> None:
    with pytest.raises(DataError, match=r"neither ruler/squad.json nor squad.json \(SQuAD 2.0"):
        ruler.generate("qa_1", word_tokenizer, data=tmp_path)
    (tmp_path / "squad.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(DataError, match=r"squad.json is broken .*expected SQuAD 2.0"):
        ruler.generate("qa_1", word_tokenizer, data=tmp_path)
    with pytest.raises(DataError, match=r"does not exist; give one with PaulGrahamEssays\.json"):
        ruler.generate("qa_1", word_tokenizer, data=tmp_path / "nowhere")
    monkeypatch.setattr(inputs, "WONDERWORDS", "0.0.1")
    with pytest.raises(DataError, match=r"pip install wonderwords==0.0.1"):
        inputs.word_lists(None)


def test_a_download_is_kept_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LONGFIT_CACHE", str(tmp_path))
    source = tmp_path / "source.json"
    source.write_text("<html>not found</html>")
    monkeypatch.setitem(downloads.URLS, "squad.json", source.as_uri())
    with pytest.raises(DataError, match=r"cannot download squad.json from .*give a data folder"):
        inputs.squad_documents(None)
    assert not list((tmp_path / "data" / "ruler").iterdir())
    squad_file(tmp_path, 1)
    monkeypatch.setitem(downloads.URLS, "squad.json", (tmp_path / "squad.json").as_uri())
    assert len(inputs.squad_documents(None).questions) == 1
    (tmp_path / "squad.json").unlink()
    assert len(inputs.squad_documents(None).questions) == 1


def test_samples_depend_on_the_seed_alone(word_tokenizer) -> None:
    first = ruler.generate("vt", word_tokenizer, length=2048, n=2)
    assert first == ruler.generate("vt", word_tokenizer, length=2048, n=2)
    assert first[0].answers != ruler.generate("vt", word_tokenizer, length=2048, n=1, seed=7)[0].answers
    assert json.loads(json.dumps(dataclasses.asdict(first[0])))["task"] == "vt"

"""Perplexity samples: exact sizes, windows that do not overlap, documents in turn, nothing lost at the cut."""

import json
import math
from itertools import pairwise

import pytest
import torch
from tokenizers import processors

from longfit.errors import DataError, InputError, UnsupportedFeatureError
from longfit.eval.perplexity import TASKS, PerplexityTask, opening_tokens
from tests.shared_data import shared_data
from tests.test_needle import byte_tokenizer

BOOKS = TASKS["books"]


def small(target_tokens: int = 16) -> PerplexityTask:
    return PerplexityTask("books", BOOKS.source, target_tokens)


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        text = " ".join(
            f"{name}{number:05d}" for number in range(100)
        )  # 699 bytes, each window of them unlike all others
        (tmp_path / f"{name}.txt").write_text(text)
    return tmp_path


def whole(sample):
    return sample.prompt_ids + sample.target_ids


def test_context_question_and_target_are_one_stretch_of_the_document(folder):
    tokenizer = byte_tokenizer()
    for sample in small().samples(tokenizer, length=100, n=6, data=folder):
        text = (folder / sample.details["document"]).read_text()
        start = sample.details["start"]
        assert tokenizer.decode(whole(sample)) == text[start : start + 100]
        assert len(sample.question_ids) == 1 and len(sample.target_ids) == 16
        assert sample.prompt.empty_ids == () and not sample.answers


def test_documents_take_turns_and_windows_do_not_overlap_and_run_out(folder):
    samples = small().samples(byte_tokenizer(), length=100, n=1000, data=folder)
    assert len(samples) == 3 * 6  # 699 // 100 windows of each
    for first in range(0, 18, 3):
        assert len({sample.details["document"] for sample in samples[first : first + 3]}) == 3
    for name in "abc":
        starts = sorted(s.details["start"] for s in samples if s.details["document"] == f"{name}.txt")
        assert all(later - earlier >= 100 for earlier, later in pairwise(starts))


def test_the_seed_decides_and_more_samples_begin_with_the_fewer(folder):
    def drawn(n: int, seed: int):
        return [s.sha256 for s in small().samples(byte_tokenizer(), length=100, n=n, seed=seed, data=folder)]

    assert drawn(8, 1)[:3] == drawn(3, 1)
    assert drawn(6, 1) != drawn(6, 2)


def test_a_begin_token_stands_before_each_context_once(folder):
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<|start|>", "<|end|>")],
    )
    begin = tokenizer.convert_tokens_to_ids("<|start|>")
    assert opening_tokens(tokenizer) == (begin,)
    sample = small().samples(tokenizer, length=100, n=1, data=folder)[0]
    assert whole(sample).count(begin) == 1 and whole(sample)[0] == begin and len(whole(sample)) == 100
    assert sample.prompt.empty_ids == (begin,)


def test_wikitext_lines_are_joined_as_they_stand(tmp_path):
    (tmp_path / "wikitext_x.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("", " = A = \n", "b\u2028c" * 9))
    )
    sample = PerplexityTask("wikitext", TASKS["wikitext"].source, 4).samples(
        byte_tokenizer(), length=20, n=1, seed=0, data=tmp_path
    )[0]
    joined = "\n = A = \n" + "b\u2028c" * 9
    encoded = byte_tokenizer()(joined, add_special_tokens=False)["input_ids"]
    start = sample.details["start"]
    assert list(whole(sample)) == encoded[start : start + 20]


def test_missing_or_broken_data_name_the_source_and_the_format(tmp_path):
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match=r"gutenberg\.org.*standardebooks"):
        BOOKS.samples(tokenizer, length=1000, n=1)
    with pytest.raises(DataError, match="wikitext-2-raw-v1"):
        TASKS["wikitext"].samples(tokenizer, length=1000, n=1, data=tmp_path)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DataError, match="lower the length"):
        small().samples(tokenizer, length=100, n=1, data=tmp_path)
    (tmp_path / "wikitext.jsonl").write_text('{"body": 1}\n')
    with pytest.raises(DataError, match=r"wikitext\.jsonl"):
        TASKS["wikitext"].samples(tokenizer, length=1000, n=1, data=tmp_path)


def test_what_cannot_be_asked_is_refused(folder):
    with pytest.raises(InputError, match="256 target tokens"):
        BOOKS.samples(byte_tokenizer(), length=257, n=1, data=folder)
    with pytest.raises(UnsupportedFeatureError, match="likelihood"):
        BOOKS.score("text", small().samples(byte_tokenizer(), length=100, n=1, data=folder)[0])


@torch.no_grad()
def test_the_plain_models_score_is_the_likelihood_of_the_text(folder):
    from longfit.eval.answering import Reader, likelihood
    from tests.tiny import tiny_model

    model = tiny_model("llama", vocab_size=300)
    sample = small().samples(byte_tokenizer(), length=100, n=1, data=folder)[0]
    nll = likelihood(Reader(model, byte_tokenizer()), sample, None, sample.context_ids).nll
    ids = torch.tensor([whole(sample)])
    logits = model(ids).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[-17:-1], ids[0, -16:]).item()
    assert math.isclose(sum(nll) / len(nll), expected, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("name", "file"), [("books", "books/h-g-wells_the-time-machine.txt"), ("wikitext", "wiki/wikitext2_raw_test.jsonl")]
)
def test_the_real_texts_give_samples(name, file, tmp_path):
    lines = shared_data("text", *file.split("/")).read_text().split("\n")
    (tmp_path / file.split("/")[1]).write_text("\n".join(lines[:200]))  # enough, and a byte tokenizer is slow
    samples = TASKS[name].samples(byte_tokenizer(), length=1024, n=2, data=tmp_path)
    assert [len(whole(sample)) for sample in samples] == [1024, 1024]

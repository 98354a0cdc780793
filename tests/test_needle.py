"""Needle samples: RULER's form, exact lengths, depths that cover the context, a cut that loses nothing."""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longfit.errors import DataError, InputError, UnknownNameError
from longfit.eval import needle
from longfit.eval.intervals import bootstrap_mean, mean_interval, paired_difference, stratified_mean, wilson
from longfit.eval.suites import get_task


def generate(task, tokenizer, **how):
    return needle.TASKS[task].samples(tokenizer, **how)


TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, with a chat template: lengths can be counted by hand."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>"], "eos_token": "<|end|>"})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize("task", needle.TASKS)
def test_the_parts_are_the_prompt_and_fill_the_length(tokenizer, task):
    longest_word = 6
    for sample in generate(task, tokenizer, length=1500, n=5):
        whole = tokenizer(sample.prompt.context + sample.prompt.question, add_special_tokens=False)["input_ids"]
        assert list(sample.prompt_ids) == whole
        used = len(sample.prompt_ids) + needle.MAX_NEW_TOKENS
        assert 1500 - longest_word - 1 <= used <= 1500


def test_the_template_is_rulers_and_the_prefix_follows_the_assistant_header(tokenizer):
    sample = generate("niah_single", tokenizer, length=1500, n=1)[0]
    assert sample.prompt.context.startswith(
        "<|start|>user\nA special magic number is hidden within the following text. "
        "Make sure to memorize it. I will quiz you about the number afterwards.\n"
    )
    key = sample.prompt.question.split(" for ")[1].split(" mentioned")[0]
    assert sample.prompt.question == (
        f"What is the special magic number for {key} mentioned in the provided text?"
        f"<|end|>\n<|start|>assistant\n The special magic number for {key} mentioned in the provided text is"
    )
    assert f"One of the special magic numbers for {key} is: {sample.answers[0]}." in sample.prompt.context


def test_without_a_chat_template_the_prompt_is_plain_text():
    sample = generate("niah_single", byte_tokenizer(None), length=1500, n=1)[0]
    assert (
        sample.prompt.context.startswith("A special magic number")
        and "text? The special magic" in sample.prompt.question
    )


@pytest.mark.parametrize("n", [1, 7, 20, 30])
def test_depths_cover_the_context_and_so_does_each_beginning_of_the_samples(n):
    order = [needle.stratum(index, n) for index in range(n)]
    assert sorted(order) == list(range(n))
    if n >= 20:
        assert {4 * place // n for place in order[:5]} == {0, 1, 2, 3}


@pytest.mark.parametrize("task", needle.TASKS)
def test_needles_are_where_the_spans_and_the_depth_say(tokenizer, task):
    for sample in generate(task, tokenizer, length=3000, n=8):
        assert len(sample.details["needle_tokens"]) == needle.TASKS[task].needles
        texts = [tokenizer.decode(sample.context_ids[start:stop]) for start, stop in sample.details["needle_tokens"]]
        assert all(text.startswith("One of the special magic numbers") and text.endswith(".") for text in texts)
        assert [sample.answers[0] in text for text in texts] == [True] + [False] * (len(texts) - 1)
        first, last = sample.details["haystack_tokens"]
        place = (sample.details["needle_tokens"][0][0] - first) / (last - first)
        assert place == pytest.approx(sample.details["depth"], abs=0.12)


def test_samples_depend_on_the_seed_and_on_nothing_else(tokenizer):
    first = generate("niah_multikey", tokenizer, length=1500, n=4)
    random.seed(0)
    assert generate("niah_multikey", tokenizer, length=1500, n=4) == first
    other = generate("niah_multikey", tokenizer, length=1500, n=4, seed=7)
    assert {sample.sha256 for sample in first}.isdisjoint(sample.sha256 for sample in other)


def test_a_data_folder_gives_essays_and_words(tokenizer, tmp_path):
    (tmp_path / "ruler" / "wonderwords" / "3.0").mkdir(parents=True)
    essay = "  ".join(f"Sentence number {i} of\nthe essay." for i in range(400))
    (tmp_path / "ruler" / "PaulGrahamEssays.json").write_text(json.dumps({"text": essay}))
    (tmp_path / "ruler" / "wonderwords" / "3.0" / "adjectivelist.txt").write_text("mauve\n")
    (tmp_path / "ruler" / "wonderwords" / "3.0" / "nounlist.txt").write_text("walrus\n")
    sample = generate("niah_single", tokenizer, length=1500, n=1, data=tmp_path)[0]
    assert "mauve-walrus" in sample.prompt.question and "of the essay. Sentence number" in sample.prompt.context


def test_plain_text_files_do_too_and_an_empty_folder_is_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match="no text"):
        needle.load_haystack(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        needle.load_haystack(tmp_path / "nowhere")
    (tmp_path / "PaulGrahamEssays.json").write_text("<html>")
    with pytest.raises(DataError, match=r"PaulGrahamEssays\.json is broken"):
        needle.load_haystack(tmp_path)
    (tmp_path / "PaulGrahamEssays.json").unlink()
    (tmp_path / "book.txt").write_text("Once upon a time.")
    assert needle.load_haystack(tmp_path).words == ("Once", "upon", "a", "time.")


def test_what_cannot_be_made_is_refused(tokenizer):
    with pytest.raises(UnknownNameError, match="niah_multikey"):
        get_task("needle", "niah_multiky")
    with pytest.raises(UnknownNameError, match="did you mean 'needle'"):
        get_task("needles", "niah_multikey")
    with pytest.raises(InputError, match=r"niah_\w+ does not fit into \d+ tokens.*need \d+; raise the length"):
        generate("niah_single", tokenizer, length=300, n=1)
    with pytest.raises(InputError, match="drops or repeats"):
        generate("niah_single", byte_tokenizer("{{ 'no user text' }}"), length=1500, n=1)


def test_scoring_finds_the_answer_anywhere_and_stops_at_a_whole_number():
    assert needle.score(" **1234567**.", ["1234567"]) == 1.0
    assert needle.score("ABC and\x00x", ["abc", "def"]) == 0.5
    assert not needle.complete(" 123456") and needle.complete(" 1234567")


def test_wilson_agrees_with_published_values():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(InputError):
        wilson(3, 2)


def test_intervals_of_few_samples_a_task_cover() -> None:
    """Twelve tasks of two samples each: drawing two of two would cover 80 % where 95 are claimed."""
    rng = np.random.default_rng(0)
    rates = np.linspace(0.2, 0.8, 12)
    inside = 0
    for _ in range(200):
        drawn = {str(task): list((rng.random(2) < rate).astype(float)) for task, rate in enumerate(rates)}
        _, low, high = stratified_mean(drawn, draws=400)
        inside += low - 1e-9 <= rates.mean() <= high + 1e-9
    assert inside >= 180


def test_an_interval_fits_its_scores():
    assert mean_interval([1, 1, 0, 1]) == (0.75, *wilson(3, 4))
    assert mean_interval([0.2, 0.4, 0.9])[0] == pytest.approx(0.5)
    mean, low, high = mean_interval([0.5] * 10)
    assert mean == 0.5 and low < 0.3 and high > 0.7
    mean, low, high = stratified_mean({"a": [0.0, 1.0] * 10, "b": [1.0] * 20})
    assert mean == 0.75 and 0.6 < low < 0.75 < high < 0.9
    assert stratified_mean({"a": [0.0], "b": [1.0] * 99})[0] == 0.5  # tasks weigh alike
    with pytest.raises(InputError):
        stratified_mean({"a": []})


def test_bootstrap_is_deterministic():
    assert bootstrap_mean([0.0, 1.0] * 10) == bootstrap_mean([0.0, 1.0] * 10)


def test_paired_differences_use_the_pairing_and_never_claim_certainty():
    mean, low, high = paired_difference([0] * 20, [1] * 20)
    assert mean == low == -1.0 and -0.8 < high < -0.7
    alike, opposed = [0, 1] * 10, [1, 0] * 10
    same, crossed = paired_difference(alike, alike), paired_difference(alike, opposed)
    assert same[0] == crossed[0] == 0.0
    assert same[2] - same[1] < crossed[2] - crossed[1]
    forth, back = paired_difference(alike, [1] * 20), paired_difference([1] * 20, alike)
    assert forth == pytest.approx((-back[0], -back[2], -back[1]))
    assert paired_difference([0.5, 0.25], [0.5, 0.25]) == (0.0, 0.0, 0.0)
    with pytest.raises(InputError):
        paired_difference([1], [1, 0])


@pytest.mark.real
def test_smollm2_finds_the_needle_with_the_full_cache(tmp_path):
    import torch

    from longfit.eval.answering import Reader, answer
    from longfit.eval.cells import Cell
    from longfit.loading import load

    model, tokenizer = load("smollm2-135m", dtype=torch.float32, progress=False)
    samples = generate("niah_single", tokenizer, length=512, n=3)
    for sample in samples:
        whole = tokenizer(sample.prompt.context + sample.prompt.question, add_special_tokens=False)["input_ids"]
        assert list(sample.prompt_ids) == whole
        assert "You are a helpful AI assistant named SmolLM" in sample.prompt.context
    reader = Reader(model, tokenizer)
    task = needle.TASKS["niah_single"]
    records = [answer(reader, task, sample, Cell("full"))[0] for sample in samples]
    assert [record["score"] for record in records] == [1.0] * 3

"""The failure probes: facts where they should be to the token, pairs alike but for the fact, digits counted rightly."""

from collections import Counter

import pytest

from longfit.errors import InputError
from longfit.eval.probes import PLACES, TASKS, BoundaryTask, leading_right, prefix_right
from tests.test_needle import byte_tokenizer

SMALL = {"boundary": BoundaryTask(segment_tokens=200), **{name: TASKS[name] for name in ("surprise", "along_the_way")}}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def made(name, tokenizer, n=8, length=1100, **more):
    return SMALL[name].samples(tokenizer, length=length, n=n, **more)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [900, 901])
def test_prompt_and_answer_fill_the_length_to_the_token(tokenizer, name, length):
    for sample in made(name, tokenizer, length=length):
        assert len(sample.prompt_ids) + sample.max_new_tokens == length


@pytest.mark.parametrize("name", TASKS)
def test_the_fact_stands_once_where_the_details_say_and_is_what_is_asked(tokenizer, name):
    for sample in made(name, tokenizer):
        start, stop = sample.details["fact_tokens"]
        fact = tokenizer.decode(sample.context_ids[start:stop])
        assert fact.startswith("\nThe ") and fact.endswith(f" is {sample.answers[0]}.\n")
        assert sample.prompt.context.count(sample.answers[0]) == 1
        stem = fact.strip().removesuffix(f" {sample.answers[0]}.")
        assert sample.prompt.question.endswith(f"<|start|>assistant\n {stem}")
        assert sample.answers[0] not in sample.prompt.question
        assert (
            len(sample.prompt.empty_ids) < start
            and tuple(sample.prompt.empty_ids) == sample.context_ids[: len(sample.prompt.empty_ids)]
        )


@pytest.mark.parametrize("name", TASKS)
def test_samples_depend_on_the_seed_and_more_begin_with_the_fewer(tokenizer, name):
    assert made(name, tokenizer, n=8)[:3] == made(name, tokenizer, n=3)
    other = {sample.sha256 for sample in made(name, tokenizer, seed=7)}
    assert other.isdisjoint(sample.sha256 for sample in made(name, tokenizer))


@pytest.mark.parametrize("name", TASKS)
def test_depths_spread_over_the_context(tokenizer, name):
    depths = [sample.details["depth"] for sample in made(name, tokenizer, n=32, length=2100)]
    assert min(depths) < 0.25 and max(depths) > 0.8
    assert all(any(low <= depth < low + 0.25 for depth in depths) for low in (0.25, 0.5))


@pytest.mark.parametrize("name", TASKS)
def test_a_data_folder_gives_the_text(tokenizer, name, tmp_path):
    (tmp_path / "book.txt").write_text("The zebra quagga walked. " * 20)
    assert all("quagga" in sample.prompt.context for sample in made(name, tokenizer, n=2, data=tmp_path))


def test_places_relative_to_the_boundary(tokenizer):
    samples = made("boundary", tokenizer, n=32)
    assert Counter(sample.details["place"] for sample in samples) == dict.fromkeys(PLACES, 8)
    for sample in samples:
        (start, stop), details = sample.details["fact_tokens"], sample.details
        assert start == 200 * details["segment"] + details["offset"]
        inside = (stop - 1) // 200 == start // 200
        assert inside == (details["place"] != "across")
        if details["place"] == "after":
            assert details["offset"] == 0
        if details["place"] == "end":
            assert stop % 200 == 0
        if details["place"] == "middle":
            assert abs(details["offset"] - (200 - stop % 200)) <= 1
    assert len({sample.details["segment"] for sample in samples if sample.details["place"] == "after"}) > 2


def test_pairs_differ_in_the_fact_only(tokenizer):
    samples = made("surprise", tokenizer)
    for on, off in zip(samples[::2], samples[1::2], strict=True):
        assert (on.details["topic"], off.details["topic"]) == ("on", "off")
        assert on.answers == off.answers and on.details["domain"] == off.details["domain"]
        first, second = (list(sample.context_ids) for sample in (on, off))
        for sample, ids in ((on, first), (off, second)):
            del ids[slice(*sample.details["fact_tokens"])]
        start = min(on.details["fact_tokens"][0], off.details["fact_tokens"][0])
        assert first[:start] == second[:start] and on.prompt.context != off.prompt.context


def test_codes_are_the_first_five_digits(tokenizer):
    task, sample = SMALL["boundary"], made("boundary", tokenizer, n=1)[0]
    code = sample.answers[0]
    assert task.score(f" {code}.", sample) == 1.0
    assert task.score(f" 00000 or {code}", sample) == 0.0 and task.score(f" {code[:4]}", sample) == 0.0
    assert not task.settled(f" {code[:4]}", sample) and task.settled(f" {code}", sample)


def test_digits_count_up_to_the_first_mistake(tokenizer):
    key = "0123456789abcdef" * 2
    assert leading_right(f" **{key.upper()}**", key) == 32
    assert leading_right(key[:10] + "x" + key[11:], key) == 10
    assert leading_right("", key) == 0 and leading_right(key[:5], key) == 5
    assert prefix_right(key[:16] + "-", key) == {4: True, 8: True, 16: True, 32: False}
    task, sample = SMALL["along_the_way"], made("along_the_way", tokenizer, n=1)[0]
    right = sample.answers[0]
    assert task.score(f" {right}", sample) == 1.0 and task.score(right[:8] + "z", sample) == 0.25
    assert not task.settled(f" {right[:8]}", sample)
    assert task.settled(f" {right[:8]}z", sample) and task.settled(right, sample)


def test_too_short_a_length_is_refused(tokenizer):
    with pytest.raises(InputError, match="segments"):
        TASKS["boundary"].samples(tokenizer, length=1100, n=1)
    with pytest.raises(InputError, match="raise it"):
        made("surprise", tokenizer, length=200)

"""Tokens as text: every token has its characters, words and sentences stay whole, the prompt's frame is found."""

import pytest

from longfit.compressors.prompt.budgets import best_sentences, best_words, leading_words
from longfit.compressors.prompt.passage import Passage, question_of
from longfit.compressors.prompt.units import Unit, fixed, phrases, sentences, words
from tests.prompt_models import CJK, STORY, bpe_tokenizer
from tests.words import word_tokenizer

TEXTS = {
    "plain": STORY,
    "letters of several tokens": "naïve café, 東京。 😀 👨‍👩‍👧 ok",
    "spaces": "  two  spaces\n\n\tand tabs \n",
    "cjk": CJK,
    "empty": "",
}


def passage_of(text: str) -> Passage:
    tokenizer = bpe_tokenizer()
    return Passage.of(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def said(passage: Passage, units) -> list[str]:
    return [passage.said(*unit) for unit in units]


@pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))
def test_tokens_say_the_text_and_units_cover_it_without_parting_a_letter(text):
    passage = passage_of(text)
    assert passage.text == text
    free = [True] * len(passage)
    for cut in (words, phrases, sentences):
        units = cut(passage, free)
        assert "".join(said(passage, units)) == text
        assert not any(passage.splits(unit.first) for unit in units)


def test_a_tokenizer_that_joins_with_spaces():
    tokenizer = word_tokenizer()
    passage = Passage.of(tokenizer, tokenizer("w1 w2 w3")["input_ids"])
    assert said(passage, words(passage, [True] * 3)) == [" w1", " w2", " w3"]


def test_broken_bytes_stay_where_they_are():
    tokenizer = bpe_tokenizer()
    ids = tokenizer("a東", add_special_tokens=False)["input_ids"][:-1] + tokenizer(" b")["input_ids"]
    passage = Passage.of(tokenizer, ids)
    assert len(passage) == len(ids)
    assert passage.text.startswith("a\ufffd") and passage.text.endswith(" b")


def test_sentences_end_where_they_end():
    passage = passage_of(
        'Mr. Alder paid 3.14 crowns. "Why?" he asked. U.S. ships left!\n\nNew line: e.g. this. 七七。一四'
    )
    assert said(passage, sentences(passage, [True] * len(passage))) == [
        "Mr. Alder paid 3.14 crowns.",
        ' "Why?" he asked.',
        " U.S. ships left!",
        "\n\nNew line: e.g. this.",
        " 七七。",
        "一四",
    ]


def test_long_sentences_and_words_are_cut():
    passage = passage_of("word " * 500 + "x1y2" * 200)
    free = [True] * len(passage)
    assert max(unit.tokens for unit in sentences(passage, free, 64)) <= 64
    assert max(unit.tokens for unit in words(passage, free)) <= 32


def test_the_frame_of_a_chat_prompt_is_found():
    tokenizer = bpe_tokenizer(template=True)
    turns = [{"role": "system", "content": "You help."}, {"role": "user", "content": STORY}]
    ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    passage = Passage.of(tokenizer, ids)
    frame = fixed(passage)
    kept = "".join(passage.text[a:b] for a, b in passage.spans([at for at, keep in enumerate(frame) if keep]))
    assert kept == "<|start|>system\nYou help.<|end|>\n<|start|>user\n<|end|>\n"
    assert not any(fixed(passage_of(STORY)))


@pytest.mark.parametrize(
    ("tail", "question"),
    [
        ("What is the code?", "What is the code?"),
        ("\n\nWhat is it?<|end|>\n<|start|>assistant\n", "What is it?"),
        ("Only give the answer.\n\nQuestion: Who was it?\nAnswer:", "Who was it?"),
        ("Who lit it?\nAnswer:", "Who lit it?"),
        ("<|end|>\n", ""),
    ],
)
def test_the_question_is_read_from_the_tail(tail, question):
    tokenizer = bpe_tokenizer()
    assert question_of(tokenizer, tokenizer(tail, add_special_tokens=False)["input_ids"]) == question


def test_filling_a_budget():
    passage = passage_of("one two three four five six seven. Eight nine ten.")
    units = words(passage, [True] * len(passage))
    assert best_words([units[0], Unit(0, 0)], 0) == []
    first, second = sentences(passage, [True] * len(passage))
    room = second.tokens + units[0].tokens + 1
    kept = best_sentences(passage, [second, first], room)
    assert room - len(kept) < max(unit.tokens for unit in units)
    assert passage.said(kept[0], units[0].stop) == "one" and kept[-second.tokens :] == list(range(*second))
    assert leading_words(passage, first, units[0].tokens - 1) == []

"""Every prompt compressor as a text tool: budgets by the target's tokenizer, whole words, provenance, bad input."""

from itertools import pairwise

import pytest
import torch

from longfit.bm25 import spaceless
from longfit.compressors import get
from longfit.compressors.prompt.lm import STRETCH_TOKENS
from longfit.compressors.prompt.passage import Passage
from longfit.compressors.prompt.units import words
from longfit.errors import InputError, UnsupportedFeatureError
from tests.prompt_models import CJK, NAMES, bpe_tokenizer, make, prompt_model, story

QUESTION = "What is the code of the gate?"
TEXT = story(6)


@pytest.fixture(scope="module")
def model():
    return prompt_model()


@pytest.fixture
def bound(model, tmp_path):
    return lambda name, **options: make(name, tmp_path, **options).bind(model, bpe_tokenizer())


def tokens(text: str) -> int:
    return len(bpe_tokenizer()(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", NAMES)
class TestEveryMethod:
    @pytest.mark.parametrize("kept", [40, 151, 400])
    def test_the_budget_is_used_and_never_passed(self, bound, name, kept):
        made = bound(name).compress_text(TEXT, question=QUESTION, kept_tokens=kept)
        assert made.kept_tokens == tokens(made.text) <= kept < made.tokens_in == tokens(TEXT)
        longest_word = max(tokens(word) for word in TEXT.split())
        assert kept - made.kept_tokens <= max(longest_word, 0.02 * kept)

    def test_ids_are_kept_to_the_token_and_whole_words_at_that(self, bound, name):
        compressor, tokenizer = bound(name), bpe_tokenizer()
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        question = compressor.question_from(tokenizer(QUESTION)["input_ids"])
        made = compressor.compress(ids, 300, question)
        assert 294 <= len(made.ids) <= 300 and made.ids == [ids[place] for place in made.places]
        assert made.places == sorted(set(made.places))
        passage, kept = Passage.of(tokenizer, ids), set(made.places)
        for word in words(passage, [True] * len(ids)):
            assert kept.issuperset(range(*word)) or kept.isdisjoint(range(*word))
        assert compressor.compress(ids, 300, question) == made

    def test_spans_are_the_source_of_the_text(self, bound, name):
        made = bound(name).compress_text(TEXT, question=QUESTION, keep_ratio=0.3)
        assert made.spans == sorted(made.spans) and all(a[1] < b[0] for a, b in pairwise(made.spans))
        assert "".join(TEXT[a:b] for a, b in made.spans).split() == made.text.split() or (
            "".join("".join(TEXT[a:b].split()) for a, b in made.spans) == "".join(made.text.split())
        )

    def test_nothing_to_do_is_no_error(self, bound, name):
        compressor = bound(name)
        short = compressor.compress_text("A short text.", question=QUESTION, kept_tokens=500)
        assert (short.text, short.spans) == ("A short text.", [(0, 13)])
        empty = compressor.compress_text("", question=QUESTION, kept_tokens=5)
        assert (empty.text, empty.spans, empty.kept_tokens, empty.tokens_in) == ("", [], 0, 0)

    def test_a_budget_below_a_word_keeps_what_fits(self, bound, name):
        made = bound(name).compress_text(TEXT, question=QUESTION, kept_tokens=1)
        assert made.kept_tokens <= 1

    def test_text_without_spaces_is_cut_between_letters(self, bound, name):
        made = bound(name).compress_text(CJK, question="門の番号は何ですか", kept_tokens=200)
        assert 196 <= made.kept_tokens <= 200 and "\ufffd" not in made.text and " " not in made.text
        assert all(spaceless(letter) for letter in made.text)

    def test_a_question_is_asked_for_by_those_that_need_one(self, bound, name):
        compressor = bound(name)
        if not compressor.query_aware:
            assert compressor.compress_text(TEXT, kept_tokens=100).kept_tokens > 90
            return
        with pytest.raises(UnsupportedFeatureError, match=f"{name} compresses for a question.*question_tokens=n"):
            compressor.compress_text(TEXT, kept_tokens=100)
        other = compressor.compress_text(TEXT, question="How much did the repairs cost?", kept_tokens=100)
        assert other.text != compressor.compress_text(TEXT, question=QUESTION, kept_tokens=100).text

    def test_another_tokenizer_may_score(self, model, tmp_path, name):
        compressor = make(name, tmp_path)
        if not compressor.reads:
            return
        small = bpe_tokenizer(300)
        other = make(name, tmp_path, scorer=(model, small)).bind(model, bpe_tokenizer())
        assert not other.lm.own
        made = other.compress_text(TEXT, question=QUESTION, kept_tokens=200)
        assert 190 <= made.kept_tokens <= 200
        assert "object at" not in repr(other) and "Llama" not in repr(other).replace("LlamaForCausalLM'", "")

    def test_long_input_is_read_in_stretches(self, bound, name, monkeypatch):
        compressor = bound(name)
        longest = 0
        if compressor.reads:
            forward = type(compressor.lm.decoder).forward

            def watched(self, *args, **kwargs):
                nonlocal longest
                cache = kwargs.get("past_key_values")
                ids, held = kwargs["input_ids"], 0 if cache is None else cache.get_seq_length()
                longest = max(longest, ids.numel() if cache is None else ids.shape[1] + held)
                return forward(self, *args, **kwargs)

            monkeypatch.setattr(type(compressor.lm.decoder), "forward", watched)
        text = story(60)
        made = compressor.compress_text(text, question=QUESTION, keep_ratio=0.1)
        assert made.tokens_in > 6000
        assert longest <= 2 * STRETCH_TOKENS
        assert 0.98 * made.tokens_in * 0.1 - 16 <= made.kept_tokens <= made.tokens_in * 0.1

    def test_sizes_that_cannot_be(self, bound, name):
        with pytest.raises(InputError, match="kept_tokens or keep_ratio"):
            bound(name).compress_text(TEXT, QUESTION, kept_tokens=3, keep_ratio=0.5)
        with pytest.raises(InputError, match="at least 1"):
            bound(name).compress_text(TEXT, QUESTION, kept_tokens=0)
        with pytest.raises(InputError, match="above 0"):
            bound(name).compress_text(TEXT, QUESTION, keep_ratio=1.5)
        with pytest.raises(InputError, match="keep_ratio"):
            get(name, keep_ratio=2.0)
        with pytest.raises(InputError, match="not both"):
            get(name, keep_ratio=0.5, kept_tokens=3)
        with pytest.raises(InputError, match="call bind"):
            get(name).compress_text(TEXT, QUESTION)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("truncate", {"head_share": 1.2}),
        ("bm25", {"b": 2.0}),
        ("late_chunking", {"chunk_tokens": 0}),
        ("selective_context", {"unit": "letter"}),
        ("llmlingua", {"coarse": 0.5}),
        ("llmlingua", {"segment_tokens": 4}),
        ("longllmlingua", {"ratio_spread": -1.0}),
        ("sentinel", {"chunk_tokens": 1}),
        ("semantic", {"summaries": "poetry"}),
        ("semantic", {"scorer": 3}),
    ],
)
def test_options_that_cannot_be(name, options):
    with pytest.raises(InputError, match=f"{name}: .*{next(iter(options))}"):
        get(name, **options)


def test_the_tokenizer_is_found_beside_the_model_or_asked_for(model, tmp_path):
    with pytest.raises(InputError, match="give tokenizer="):
        get("truncate").bind(model)
    model.save_pretrained(tmp_path)
    bpe_tokenizer().save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path)
    assert get("truncate").bind(saved).compress_text(TEXT, kept_tokens=50).kept_tokens > 40
    with pytest.raises(InputError, match="scores with a language model"):
        get("llmlingua").bind(None, bpe_tokenizer())


def test_sentinel_asks_for_a_probe_and_refuses_one_of_another_shape(model, tmp_path):
    with pytest.raises(InputError, match='scorer="smollm2-135m"'):
        get("sentinel").bind(model, bpe_tokenizer())
    with pytest.raises(InputError, match="for 2 layers of 6 heads, and the model has 3 of 6"):
        make("sentinel", tmp_path).bind(prompt_model("gemma3_text"), bpe_tokenizer())
    with pytest.raises(InputError, match="cannot be read"):
        get("sentinel", probe=str(tmp_path / "none.json")).bind(model, bpe_tokenizer())
    (tmp_path / "bad.json").write_text('{"format": 1, "layers": 2}')
    with pytest.raises(InputError, match="is no probe"):
        get("sentinel", probe=str(tmp_path / "bad.json")).bind(model, bpe_tokenizer())


def test_truncation_keeps_both_ends_or_one(model):
    ends = {share: get("truncate", head_share=share).bind(model, bpe_tokenizer()) for share in (0.0, 0.5, 1.0)}
    made = {share: found.compress_text(TEXT, kept_tokens=60) for share, found in ends.items()}
    assert TEXT.strip().startswith(made[1.0].text) and TEXT.strip().endswith(made[0.0].text)
    assert made[0.5].spans[0][0] == 0 and made[0.5].spans[-1][1] == len(TEXT) and len(made[0.5].spans) == 2


def test_bm25_finds_the_sentence_that_answers(model):
    made = get("bm25").bind(model, bpe_tokenizer()).compress_text(story(1), QUESTION, kept_tokens=60)
    assert "The code of the gate is 7714" in made.text


def test_written_summaries_are_the_models_words_within_the_budget(model):
    compressor = get("semantic", summaries="lm").bind(model, bpe_tokenizer())
    ids = bpe_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    made = compressor.compress(ids, 120)
    assert 0 < len(made.ids) <= 120 and made.places == sorted(made.places) and max(made.places) < len(ids)
    assert compressor.compress_text(TEXT, kept_tokens=120).kept_tokens <= 120


def test_scoring_leaves_the_model_as_it_was(model, bound):
    before = model.config._attn_implementation, {k: v.clone() for k, v in model.state_dict().items()}
    for name in NAMES:
        bound(name).compress_text(TEXT, QUESTION, kept_tokens=60)
    assert model.config._attn_implementation == before[0]
    assert all(torch.equal(value, before[1][key]) for key, value in model.state_dict().items())

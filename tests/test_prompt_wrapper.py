"""Prompt compressors behind wrap: the model reads exactly the kept ids; batches, memories, pipelines, budgets."""

import json

import pytest
import torch

import longfit
from longfit.compressors import get
from longfit.context import FitContext
from longfit.errors import BudgetError, FingerprintError, InputError, MemoryFileError, UnsupportedFeatureError
from longfit.fitted import FitMixin
from tests.prompt_models import NAMES, STORY, bpe_tokenizer, make, prompt_model, story

HOW = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
QUESTION = "\nWhat is the code of the gate?"


def encoded(text: str) -> torch.Tensor:
    return bpe_tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


CONTEXT, ASKED = encoded(story(4)), encoded(QUESTION)
PROMPT = torch.cat([CONTEXT, ASKED], 1)
Q = ASKED.shape[1]


@pytest.fixture
def wrapped(tmp_path):
    def wrap(name, budget="25%", family="llama", **options):
        steps = [make(step, tmp_path, **options) if step in NAMES else step for step in name.split("+")]
        return longfit.wrap(prompt_model(family), steps, budget=budget, tokenizer=bpe_tokenizer())

    return wrap


def kept_ids(model, row: int = 0) -> torch.Tensor:
    """What the model read in place of the prompt: what is kept of it, by its provenance."""
    left = model.longfit_last.shortened
    return left.ids[row : row + 1, left.own_padding[row] :]


@pytest.fixture(autouse=True)
def last_cache(monkeypatch):
    """Every cache that a wrapped model makes is at hand afterwards, as `model.longfit_last`."""
    made = FitContext.new_cache

    def new_cache(self, decoder, *args, **kwargs):
        cache = made(self, decoder, *args, **kwargs)
        holder["cache"] = cache
        return cache

    holder: dict = {}
    monkeypatch.setattr(FitContext, "new_cache", new_cache)
    monkeypatch.setattr(FitMixin, "longfit_last", property(lambda self: holder["cache"]), raising=False)


@pytest.mark.parametrize("name", NAMES)
class TestEveryMethod:
    def test_the_model_reads_the_kept_ids_and_nothing_else(self, wrapped, name):
        model = wrapped(name)
        out = model.generate(PROMPT, question_tokens=Q, **HOW)
        read = kept_ids(model)
        left = model.longfit_last.shortened
        assert torch.equal(read[0], PROMPT[0, left.places[0]]) and torch.equal(read[:, -Q:], ASKED)
        limit = int(0.25 * PROMPT.shape[1])
        assert 0.98 * limit - 8 <= read.shape[1] <= limit
        with model.disabled():
            plain = model.generate(read, **HOW)
        assert torch.equal(out[:, : PROMPT.shape[1]], PROMPT)
        assert torch.equal(out[:, PROMPT.shape[1] :], plain[:, read.shape[1] :])
        report = model.fit_report
        assert report.tokens_in == PROMPT.shape[1] + 4 and report.prompt_tokens == read.shape[1]
        assert report.kept_tokens == read.shape[1] + 4
        assert report.question_aware == get(name).query_aware
        assert f"shortened to {read.shape[1]:,} tokens" in str(report)

    def test_a_memory_answers_as_the_whole_prompt_does_and_never_changes(self, wrapped, name, tmp_path):
        model = wrapped(name, budget="150 tokens")
        aware = model.longfit.prompt.query_aware
        memory = model.compress(CONTEXT, question_ids=ASKED if aware else None)
        assert memory.tokens_in == CONTEXT.shape[1] and 140 <= memory.kept_tokens <= 150
        first = model.generate(ASKED, memory=memory, **HOW)
        assert torch.equal(first, model.generate(ASKED, memory=memory, **HOW))
        read = memory.cache.shortened.ids
        with model.disabled():
            plain = model.generate(torch.cat([read, ASKED], 1), **HOW)
        assert torch.equal(first[:, Q:], plain[:, -5:])
        if aware:
            with pytest.raises(InputError, match="another question"):
                model.generate(encoded("Who was it?"), memory=memory, **HOW)
        else:
            assert model.generate(encoded("Who was it?"), memory=memory, **HOW) is not None
        folder = memory.save(tmp_path / "story.ctx")
        loaded = longfit.Memory.load(folder, model)
        assert torch.equal(model.generate(ASKED, memory=loaded, **HOW), first)
        assert loaded.kept_spans == memory.kept_spans and loaded.tokens_in == memory.tokens_in
        stored = sum(file.stat().st_size for file in folder.iterdir())
        assert stored < memory.kv_bytes / 4, "token ids are saved, not keys and values"

    def test_a_padded_batch_is_its_rows_alone(self, wrapped, name):
        model = wrapped(name)
        short = torch.cat([CONTEXT[:, 40:], ASKED], 1)
        n = PROMPT.shape[1] - short.shape[1]
        ids = torch.cat([torch.nn.functional.pad(short, (n, 0)), PROMPT])
        mask = torch.ones_like(ids)
        mask[0, :n] = 0
        both = model.generate(ids, attention_mask=mask, question_tokens=Q, **HOW)[:, ids.shape[1] :]
        alone = [model.generate(row, question_tokens=Q, **HOW)[:, row.shape[1] :] for row in (short, PROMPT)]
        assert torch.equal(both, torch.cat(alone))

    def test_before_a_method_that_trims_it_is_that_method_on_what_is_kept(self, wrapped, name):
        model = wrapped(f"{name}+h2o", budget="100 tokens")
        out = model.generate(PROMPT, question_tokens=Q, **HOW)[:, PROMPT.shape[1] :]
        read = kept_ids(model)
        ratio = model.longfit.prompt.default_ratio
        assert read.shape[1] <= max(100, int(ratio * PROMPT.shape[1])) and model.fit_report.kept_tokens <= 100
        longfit.wrap(model, "h2o", budget="100 tokens")
        assert torch.equal(out, model.generate(read, question_tokens=Q, **HOW)[:, read.shape[1] :])

    def test_what_fits_is_read_as_it_is(self, wrapped, name):
        model = wrapped(name, budget="2000 tokens")
        out = model.generate(PROMPT, **HOW)
        with model.disabled():
            assert torch.equal(out, model.generate(PROMPT, **HOW))
        assert model.fit_report.prompt_tokens is None


class TestBudgets:
    @pytest.mark.parametrize("tokens", [60, 137, 300])
    def test_in_tokens(self, wrapped, tokens):
        model = wrapped("bm25", budget=f"{tokens} tokens")
        model.generate(PROMPT, question_tokens=Q, **HOW)
        assert tokens - 8 <= model.fit_report.prompt_tokens <= tokens
        assert model.fit_report.limit_tokens == tokens

    def test_in_bytes_there_is_room_for_the_answer(self, wrapped):
        model = wrapped("bm25", budget="192KiB")
        how = {**HOW, "max_new_tokens": 40}
        model.generate(PROMPT, question_tokens=Q, **how)
        report = model.fit_report
        assert report.kv_bytes <= 192 * 1024 and report.kept_tokens <= report.limit_tokens
        assert report.prompt_tokens + 40 >= report.limit_tokens - 8

    def test_without_one_the_options_say_it(self, tmp_path):
        n = PROMPT.shape[1]
        for options, most in (({}, n // 2), ({"keep_ratio": 0.2}, n // 5), ({"kept_tokens": 90}, 90)):
            model = longfit.wrap(prompt_model(), "bm25", tokenizer=bpe_tokenizer(), **options)
            model.generate(PROMPT, question_tokens=Q, **HOW)
            assert most - 8 <= model.fit_report.prompt_tokens <= most and model.fit_report.budget == "none"

    def test_a_pipeline_does_not_go_below_the_budget_unless_it_is_told_to(self, wrapped):
        n = PROMPT.shape[1]
        model = wrapped("bm25+snapkv", budget="80%")
        model.generate(PROMPT, question_tokens=Q, **HOW)
        assert int(0.8 * n) - 8 <= model.fit_report.prompt_tokens <= int(0.8 * n)
        model = wrapped("bm25+snapkv", budget="80%", keep_ratio=0.3)
        model.generate(PROMPT, question_tokens=Q, **HOW)
        assert model.fit_report.prompt_tokens <= int(0.3 * n)

    def test_a_share_is_one_of_what_was_given(self, wrapped):
        model = wrapped("bm25+knorm", budget="20%")
        model.generate(PROMPT, question_tokens=Q, **HOW)
        n = PROMPT.shape[1]
        assert 0.2 * n - 2 <= model.fit_report.kept_tokens <= 0.2 * n + 5
        assert model.fit_report.prompt_tokens > 0.4 * n

    def test_what_cannot_be_met_is_refused_with_what_would_do(self, wrapped):
        model = wrapped("bm25", budget="5 tokens")
        with pytest.raises(BudgetError, match=f'smallest that would do is "{Q} tokens"'):
            model.generate(PROMPT, question_tokens=Q, **HOW)

    def test_past_the_window_the_kept_prompt_has_to_fit_it(self, tmp_path):
        model = longfit.wrap(
            prompt_model(max_position_embeddings=512), "bm25", budget="300 tokens", tokenizer=bpe_tokenizer()
        )
        ids = torch.cat([encoded(story(20)), ASKED], 1)
        model.generate(ids, question_tokens=Q, **HOW)
        assert 292 <= model.fit_report.prompt_tokens <= 300 and model.fit_report.geometry == "original"
        longfit.wrap(model, "bm25", budget="600 tokens", tokenizer=bpe_tokenizer())
        with pytest.raises(BudgetError, match="more than the model's window of 512"):
            model.generate(ids, question_tokens=Q, **HOW)


class TestCalls:
    def test_the_last_tokens_stay_where_nobody_said_what_is_asked(self, wrapped):
        model = wrapped("truncate", window_tokens=12)
        model.generate(PROMPT, **HOW)
        assert torch.equal(kept_ids(model)[:, -12:], PROMPT[:, -12:])

    def test_the_chat_templates_tokens_stay(self, tmp_path):
        tokenizer = bpe_tokenizer(template=True)
        turns = [{"role": "system", "content": "You help."}, {"role": "user", "content": story(4) + QUESTION}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = encoded(text)
        tail = encoded(QUESTION + text.partition(QUESTION)[2]).shape[1]
        model = longfit.wrap(prompt_model(), "bm25", budget="30%", tokenizer=tokenizer)
        model.generate(ids, question_tokens=tail, **HOW)
        read = tokenizer.decode(kept_ids(model)[0])
        assert read.startswith("<|start|>system\nYou help.<|end|>\n<|start|>user\n")
        assert read.endswith(f"{QUESTION}<|end|>\n<|start|>assistant\n")
        assert "The code of the gate is 7714" in read

    def test_a_question_is_asked_for(self, wrapped):
        model = wrapped("bm25")
        with pytest.raises(UnsupportedFeatureError, match="question_tokens=n"):
            model.generate(PROMPT, **HOW)
        with pytest.raises(UnsupportedFeatureError, match="question_ids"):
            model.compress(CONTEXT)
        with pytest.raises(UnsupportedFeatureError, match="truncate does not look at the question"):
            wrapped("truncate").compress(CONTEXT, question_ids=ASKED)

    def test_beams_streams_and_a_second_turn(self, wrapped):
        model = wrapped("truncate", budget="120 tokens")
        beams = model.generate(PROMPT, num_beams=3, num_return_sequences=2, **HOW)
        read = kept_ids(model)
        with model.disabled():
            plain = model.generate(read, num_beams=3, num_return_sequences=2, **HOW)
        assert torch.equal(beams[:, PROMPT.shape[1] :], plain[:, read.shape[1] :])
        how = {**HOW, "return_dict_in_generate": True}
        first = model.generate(PROMPT, **how)
        cache, more = first.past_key_values, encoded(" And then?")
        longer = torch.cat([first.sequences, more], 1)
        second = model.generate(longer, past_key_values=cache, **HOW)[:, longer.shape[1] :]
        whole = torch.cat([read, longer[:, PROMPT.shape[1] :]], 1)
        with model.disabled():
            assert torch.equal(second, model.generate(whole, **HOW)[:, whole.shape[1] :])

    def test_forward_gives_the_logits_of_what_is_kept_and_refuses_labels(self, wrapped):
        model = wrapped("truncate")
        with torch.no_grad():
            logits = model(PROMPT, logits_to_keep=1).logits
            read = kept_ids(model)
            with model.disabled():
                assert torch.equal(logits, model(read, logits_to_keep=1).logits)
        with pytest.raises(UnsupportedFeatureError, match="labels"):
            model(PROMPT, labels=PROMPT)
        with pytest.raises(UnsupportedFeatureError, match="inputs_embeds"):
            model(inputs_embeds=model.get_input_embeddings()(PROMPT))

    def test_disabled_and_unwrapped_are_the_base_model(self, wrapped):
        model = wrapped("llmlingua")
        plain = prompt_model()
        with torch.no_grad():
            with model.disabled():
                assert torch.equal(model(PROMPT).logits, plain(PROMPT).logits)
            longfit.unwrap(model)
            assert torch.equal(model(PROMPT).logits, plain(PROMPT).logits)

    def test_beside_an_attention(self, tmp_path):
        patch = longfit.attention.get("sliding_window", window_tokens=64)
        model = longfit.wrap(prompt_model(), "truncate", budget="40%", attention=patch, tokenizer=bpe_tokenizer())
        out = model.generate(PROMPT, **HOW)[:, PROMPT.shape[1] :]
        read = kept_ids(model)
        longfit.wrap(model, attention=longfit.attention.get("sliding_window", window_tokens=64))
        assert torch.equal(out, model.generate(read, **HOW)[:, read.shape[1] :])

    def test_a_learned_compressor_goes_on_from_what_is_kept(self, tmp_path):
        steps = ["truncate", get("strided_kv", ratio=4, segment_tokens=64)]
        model = longfit.wrap(prompt_model(), steps, tokenizer=bpe_tokenizer())
        out = model.generate(PROMPT, question_tokens=Q, **HOW)[:, PROMPT.shape[1] :]
        read = kept_ids(model)
        assert 0.5 * PROMPT.shape[1] - 8 <= read.shape[1] <= 0.5 * PROMPT.shape[1]
        longfit.wrap(model, get("strided_kv", ratio=4, segment_tokens=64))
        assert torch.equal(out, model.generate(read, question_tokens=Q, **HOW)[:, read.shape[1] :])

    @pytest.mark.parametrize("family", ["gemma3_text", "qwen3", "gpt_neox", "phi3"])
    def test_other_families(self, wrapped, family):
        for name in ("llmlingua", "late_chunking", "truncate+streaming_llm"):
            model = wrapped(name, family=family)
            out = model.generate(PROMPT, question_tokens=Q, **HOW)
            assert out.shape[1] == PROMPT.shape[1] + 5
            assert model.fit_report.tokens_in == PROMPT.shape[1] + 4

    @pytest.mark.parametrize("steps", [["snapkv", "bm25"], ["bm25", "truncate"], ["strided_kv", "bm25"]])
    def test_pipelines_that_cannot_work(self, steps):
        with pytest.raises(UnsupportedFeatureError, match="a pipeline is one prompt compressor"):
            longfit.wrap(prompt_model(), steps, budget="100 tokens", tokenizer=bpe_tokenizer())

    def test_a_model_without_a_tokenizer_is_asked_for_one(self):
        with pytest.raises(InputError, match="give tokenizer="):
            longfit.wrap(prompt_model(), "bm25", budget="25%")


class TestMemories:
    def test_another_method_refuses_it(self, wrapped, tmp_path):
        memory = wrapped("truncate", budget="100 tokens").compress(CONTEXT)
        memory.save(tmp_path / "a.ctx")
        other = longfit.wrap(prompt_model(), "truncate", head_share=0.2, budget="100 tokens", tokenizer=bpe_tokenizer())
        with pytest.raises(FingerprintError, match="prompt compressor"):
            longfit.Memory.load(tmp_path / "a.ctx", other)

    def test_a_pipelines_memory_keeps_keys_and_provenance(self, wrapped, tmp_path):
        model = wrapped("truncate+snapkv", budget="100 tokens")
        memory = model.compress(CONTEXT)
        asked = model.generate(ASKED, memory=memory, **HOW)
        loaded = longfit.Memory.load(memory.save(tmp_path / "a.ctx"), model)
        assert torch.equal(model.generate(ASKED, memory=loaded, **HOW), asked)
        assert loaded.kept_spans == memory.kept_spans and loaded.tokens_in == CONTEXT.shape[1]

    def test_entries_know_their_place_in_the_source(self, wrapped):
        model = wrapped("truncate+snapkv", budget="100 tokens")
        cache = model.compress(CONTEXT).cache
        positions = cache.bounded[0].parts[0].store.positions[0, 0]
        places = cache.sources(0, positions)
        assert torch.equal(CONTEXT[0, places], cache.shortened.ids[0, positions.long()])
        later = torch.tensor([cache.seen, cache.seen + 1])
        assert cache.sources(0, later).tolist() == [CONTEXT.shape[1], CONTEXT.shape[1] + 1]

    @pytest.mark.parametrize(("name", "value"), [("tokens", []), ("columns", "x"), ("own_padding", [3])])
    def test_hostile_files_are_refused(self, wrapped, tmp_path, name, value):
        model = wrapped("truncate", budget="100 tokens")
        folder = model.compress(CONTEXT).save(tmp_path / "a.ctx")
        facts = json.loads((folder / "context.json").read_text())
        facts["cache"]["shortened"][name] = value
        (folder / "context.json").write_text(json.dumps(facts))
        with pytest.raises(MemoryFileError):
            longfit.Memory.load(folder, model)


def test_rows_that_are_alike_are_scored_once(wrapped, monkeypatch):
    model = wrapped("llmlingua")
    calls = []
    compress = type(model.longfit.prompt).compress
    monkeypatch.setattr(type(model.longfit.prompt), "compress", lambda self, *a: calls.append(1) or compress(self, *a))
    model.generate(PROMPT.expand(3, -1), num_beams=2, question_tokens=Q, **HOW)
    assert len(calls) == 1 and STORY[:10] in story(1)

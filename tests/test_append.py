"""A memory that more is read into: as if it had been read in one go, within the budget, the old one untouched."""

import pytest
import torch

import longfit
from longfit.errors import FingerprintError, InputError, UnsupportedFeatureError
from tests.methods import METHODS
from tests.test_learned_wrapper import CASES, learned, prompt
from tests.tiny import tiny_model
from tests.words import word_tokenizer

HOW = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def scores(model, memory):
    given = model.generate(prompt(1, 6, 3), memory=memory, output_scores=True, return_dict_in_generate=True, **HOW)
    return torch.stack(given.scores)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", METHODS)
def test_with_nothing_dropped_appending_is_reading_in_one_go(name, family):
    model = longfit.wrap(tiny_model(family), METHODS[name](), budget="200 tokens", chunk_tokens=16)
    ids = prompt(1, 70)
    whole, first = model.compress(ids), model.compress(ids[:, :40])
    before = scores(model, first)
    grown = first.append(model, ids[:, 40:69]).append(model, ids[:, 69:])
    assert grown.tokens_in == 70 and grown.kept_tokens == whole.kept_tokens == 70
    assert torch.allclose(scores(model, grown), scores(model, whole), atol=1e-4)
    assert first.tokens_in == 40 and torch.equal(scores(model, first), before)


@pytest.mark.parametrize("name", METHODS)
def test_the_budget_holds_and_is_used(name):
    model = longfit.wrap(tiny_model("llama"), METHODS[name](), budget="24 tokens", chunk_tokens=16)
    memory = model.compress(prompt(1, 50))
    for seed in (5, 6):
        memory = memory.append(model, prompt(1, 40, seed))
        assert memory.kept_tokens == 24
    assert memory.tokens_in == 130 and model.fit_report.tokens_in == 130


def test_a_share_of_the_input_grows_with_it_and_is_saved(tmp_path):
    model = longfit.wrap(tiny_model("llama"), METHODS["snapkv"](), budget="50%", chunk_tokens=16)
    memory = model.compress(prompt(1, 40)).append(model, prompt(1, 60, 2))
    assert memory.kept_tokens == 50
    memory.save(tmp_path / "m")
    loaded = longfit.Memory.load(tmp_path / "m", model)
    assert torch.equal(scores(model, loaded), scores(model, memory))
    again = loaded.append(model, prompt(1, 20, 3))
    assert torch.equal(scores(model, again), scores(model, memory.append(model, prompt(1, 20, 3))))


def test_packed_positions_let_a_memory_grow_past_the_window():
    how = {"budget": "24 tokens", "chunk_tokens": 16}
    model = longfit.wrap(tiny_model("llama"), METHODS["snapkv"](), **how)
    with pytest.raises(UnsupportedFeatureError, match=r'window of 512.*geometry="packed"'):
        model.compress(prompt(1, 500)).append(model, prompt(1, 40))
    model = longfit.wrap(tiny_model("llama"), METHODS["snapkv"](), geometry="packed", **how)
    memory = model.compress(prompt(1, 500)).append(model, prompt(1, 40))
    assert memory.tokens_in == 540 and memory.kept_tokens == 24 and bool(torch.isfinite(scores(model, memory)).all())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", CASES)
def test_learned_memories_refuse_by_name(name, family):
    model = longfit.wrap(tiny_model(family), learned(name))
    with pytest.raises(UnsupportedFeatureError, match="in one go"):
        model.compress(prompt(1, 50)).append(model, prompt(1, 20))


def test_prompt_compressors_refuse_by_name():
    model = longfit.wrap(tiny_model("llama"), "truncate", budget="30 tokens", tokenizer=word_tokenizer())
    with pytest.raises(UnsupportedFeatureError, match="truncate makes its memory of the whole context"):
        model.compress(prompt(1, 50)).append(model, prompt(1, 20))


def test_other_models_questions_and_rows_are_refused():
    model = longfit.wrap(tiny_model("llama"), METHODS["snapkv"](), budget="20 tokens")
    memory = model.compress(prompt(2, 60))
    with pytest.raises(InputError, match="2 rows"):
        memory.append(model, prompt(1, 20))
    asked = model.compress(prompt(1, 60), question_ids=prompt(1, 6, 3))
    with pytest.raises(UnsupportedFeatureError, match="one question"):
        asked.append(model, prompt(1, 20))
    other = longfit.wrap(tiny_model("qwen2"), METHODS["snapkv"](), budget="20 tokens")
    with pytest.raises(FingerprintError):
        memory.append(other, prompt(2, 20))


@pytest.mark.parametrize("name", ["knorm", "strided_kv", "gist"])
def test_an_observer_sees_every_chunk_and_is_gone_afterwards(name):
    kv = name in METHODS
    model = longfit.wrap(
        tiny_model("llama"),
        METHODS[name]() if kv else learned(name),
        **({"budget": "24 tokens", "chunk_tokens": 16} if kv else {}),
    )
    seen = []
    with model.longfit.observed(lambda read, total: seen.append((read, total))):
        model.compress(prompt(1, 70))
    assert seen[-1] == (70, 70) and len(seen) > 2 and all(total == 70 for _, total in seen)
    assert [read for read, _ in seen] == sorted({read for read, _ in seen})
    before = len(seen)
    model.compress(prompt(1, 70))
    assert len(seen) == before

"""A recorded prefill, trimmed by a method, is that method's own run in one chunk."""

import pytest
import torch

import longfit
from longfit.compressors import get
from longfit.eval.shared import recording
from longfit.memory import Memory
from tests.methods import METHODS
from tests.tiny import tiny_model

TOKENS = 60


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_recorded_equals_direct(name: str, family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(3, 100, (1, TOKENS))
    question = torch.randint(3, 100, (1, 7))
    how = {"max_new_tokens": 6, "do_sample": False}
    wrapped = longfit.wrap(model, METHODS[name](), budget="40%", chunk_tokens=TOKENS, geometry=None)
    memory = wrapped.compress(ids)
    held = memory.cache.nbytes
    expected = wrapped.generate(question, memory=memory, **how)
    longfit.unwrap(model)
    with recording(model, ids, [make() for make in METHODS.values()]) as recorded:
        method = METHODS[name]()
        method.bind(model)
        cache = recorded.trimmed(method, 0.4)
    assert cache.nbytes == held
    wrapped = longfit.wrap(model, method, budget="40%", chunk_tokens=TOKENS)
    memory = Memory(cache, TOKENS, wrapped._fingerprint())
    assert torch.equal(wrapped.generate(question, memory=memory, **how), expected)


def test_a_head_with_a_store_of_its_own_has_the_state_of_its_own_queries() -> None:
    model = tiny_model("llama")
    ids = torch.randint(3, 100, (1, TOKENS))
    method = get("adakv", scorer=get("expected_attention", future_tokens=16))
    memory = longfit.wrap(model, method, budget="40%", chunk_tokens=TOKENS).compress(ids)
    longfit.unwrap(model)
    with recording(model, ids, [method, METHODS["h2o"]()]) as recorded:
        cache = recorded.trimmed(method, 0.4)
    assert cache.nbytes == memory.cache.nbytes
    for ours, direct in zip(cache.bounded, memory.cache.bounded, strict=True):
        for part, expected in zip(ours.parts, direct.parts, strict=True):
            assert torch.equal(part.store.positions, expected.store.positions)


@pytest.mark.parametrize("name", ["snapkv", "adakv", "finch", "tova", "h2o"])
def test_recorded_question_equals_direct(name: str) -> None:
    model = tiny_model("llama")
    ids = torch.randint(3, 100, (1, TOKENS))
    how = {"max_new_tokens": 6, "do_sample": False}
    wrapped = longfit.wrap(model, METHODS[name](), budget="40%", chunk_tokens=TOKENS)
    expected = wrapped.generate(ids, question_tokens=9, **how)
    longfit.unwrap(model)
    with recording(model, ids, [make() for make in METHODS.values()], question_tokens=9) as recorded:
        method = METHODS[name]()
        cache = recorded.trimmed(method, 0.4)
    wrapped = longfit.wrap(model, method, budget="40%", chunk_tokens=TOKENS)
    first = torch.cat([ids, recorded.logits[:, -1].argmax(-1, keepdim=True)], 1)
    given = wrapped.generate(first, past_key_values=cache, **{**how, "max_new_tokens": 5})
    assert torch.equal(given, expected)

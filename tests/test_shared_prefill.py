"""A recorded prefill, trimmed by a method, is that method's own run in one chunk."""

import pytest
import torch

import longfit
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
    expected = wrapped.generate(question, memory=wrapped.compress(ids), **how)
    longfit.unwrap(model)
    with recording(model, ids, [make() for make in METHODS.values()]) as recorded:
        method = METHODS[name]()
        method.bind(model)
        cache = recorded.trimmed(method, 0.4)
    wrapped = longfit.wrap(model, method, budget="40%", chunk_tokens=TOKENS)
    memory = Memory(cache, TOKENS, wrapped._fingerprint())
    assert torch.equal(wrapped.generate(question, memory=memory, **how), expected)


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

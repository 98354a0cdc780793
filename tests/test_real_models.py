"""The packaged models on real text: streaming changes nothing when nothing is dropped, and a needle is found."""

import pytest
import torch

import longfit
from longfit.eval import needle
from tests.test_kvpress_agreement import FIXTURES

pytestmark = pytest.mark.real
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def passage(tokenizer, tokens: int) -> torch.Tensor:
    return tokenizer((FIXTURES / "passage.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :tokens]


@pytest.mark.parametrize("which", ["smollm2", "gemma3"])
def test_nothing_dropped_is_the_base_model(which: str, request) -> None:
    model, tokenizer = request.getfixturevalue(which)
    ids = passage(tokenizer, 330)
    how = {"attention_mask": torch.ones_like(ids), **GREEDY}
    expected = model.generate(ids, **how)
    logits = model(ids, logits_to_keep=1).logits
    wrapped = longfit.wrap(model, "snapkv", budget="100%", chunk_tokens=100)
    try:
        assert torch.equal(wrapped.generate(ids, **how), expected)
        assert torch.allclose(wrapped(ids, logits_to_keep=1, use_cache=True).logits, logits, atol=2e-3)
    finally:
        longfit.unwrap(model)


@pytest.mark.parametrize("which", ["smollm2", "gemma3"])
@pytest.mark.parametrize("method", ["streaming_llm", "snapkv", "adakv", "kvzip"])
def test_a_budget_holds_on_real_weights(which: str, method: str, request) -> None:
    model, tokenizer = request.getfixturevalue(which)
    ids = passage(tokenizer, 500)
    wrapped = longfit.wrap(model, method, budget="160 tokens", chunk_tokens=128)
    try:
        answer = wrapped.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        report = wrapped.fit_report
    finally:
        longfit.unwrap(model)
    assert answer.shape[1] == ids.shape[1] + 12
    assert 157 <= report.kept_tokens <= 160
    assert report.kv_bytes < report.full_kv_bytes


def test_a_needle_is_found_in_what_is_kept(smollm2) -> None:
    """kvzip keeps the needle at 25 % without knowing the question; random does not."""
    model, tokenizer = smollm2
    (sample,) = needle.TASKS["niah_single"].samples(tokenizer, length=1024, n=1, seed=5)
    found = {}
    for method in ("kvzip", "random"):
        wrapped = longfit.wrap(model, method, budget="25%", chunk_tokens=512)
        try:
            memory = wrapped.compress(torch.tensor([list(sample.context_ids)]))
            question = torch.tensor([list(sample.question_ids)])
            answer = wrapped.generate(question, memory=memory, max_new_tokens=10, do_sample=False)
        finally:
            longfit.unwrap(model)
        text = tokenizer.decode(answer[0, question.shape[1] :])
        found[method] = needle.score(text, sample.answers)
    assert found == {"kvzip": 1.0, "random": 0.0}

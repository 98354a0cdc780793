"""What always holds, for every method and every family, from one list each (DESIGN 7)."""

import pytest
import torch

import longfit
from longfit.cache.layer import BoundedLayer
from tests.methods import METHODS
from tests.tiny import FAMILIES, tiny_model

GREEDY = {"do_sample": False}
SOME_FAMILIES = ["llama", "gemma3_text", "gpt_neox"]


def prompt(tokens: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 100, (rows, tokens))


def everything(ids: torch.Tensor) -> dict:
    return {"attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_is_the_base_model(family: str, method: str) -> None:
    model, ids = tiny_model(family), prompt(37, rows=2)
    expected = model.generate(ids, max_new_tokens=6, **GREEDY, **everything(ids))
    logits = model(ids).logits
    wrapped = longfit.wrap(model, METHODS[method](), budget="100%", chunk_tokens=10)
    assert torch.equal(wrapped.generate(ids, max_new_tokens=6, **GREEDY, **everything(ids)), expected)
    assert torch.allclose(wrapped(ids).logits, logits, atol=2e-3, rtol=1e-3)
    with wrapped.disabled():
        assert torch.equal(wrapped(ids).logits, logits)
    assert type(longfit.unwrap(wrapped)).__mro__[1] is not type(model)
    assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_holds_at_every_step_and_is_used(family: str, method: str, monkeypatch) -> None:
    kept = 24
    held: list[float] = []
    finish = BoundedLayer.finish

    def watched(layer, looks, scaling):
        finish(layer, looks, scaling)
        if not layer.step.hold and not layer.method.replays:
            total = sum(p.kept for p in layer.parts) / len(layer.parts)
            held.append(total)
            allocated = sum(p.store.capacity for p in layer.parts if p.store is not None) / len(layer.parts)
            assert allocated <= layer.limit(0, layer.seen)
        if layer.step.phase == "decode":
            newest = [p.store.positions[..., -1] for p in layer.parts]
            assert all(bool((last == layer.seen - 1).all()) for last in newest), "a decoded token was lost"

    monkeypatch.setattr(BoundedLayer, "finish", watched)
    model, ids = tiny_model(family), prompt(61)
    wrapped = longfit.wrap(model, METHODS[method](), budget=f"{kept} tokens", chunk_tokens=16)
    wrapped.generate(ids, max_new_tokens=20, **GREEDY, **everything(ids))
    report = wrapped.fit_report
    assert report.tokens_in == 61 + 20 - 1
    assert kept - 1 <= report.kept_tokens <= kept
    if method not in ("pyramidkv", "kvzip"):
        assert max(held) <= kept


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("budget", ["20 tokens", "40%"])
def test_a_padded_batch_is_its_rows_alone(family: str, method: str, budget: str) -> None:
    model = tiny_model(family)
    rows = [prompt(n)[0] for n in (53, 30, 41)]
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.zeros(longest - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([torch.cat([torch.zeros(longest - len(row)), torch.ones(len(row))]) for row in rows]).long()
    wrapped = longfit.wrap(model, METHODS[method](), budget=budget, chunk_tokens=12)
    together = wrapped.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    for row, answer in zip(rows, together, strict=True):
        alone = wrapped.generate(row[None], max_new_tokens=8, **GREEDY, **everything(row[None]))
        assert torch.equal(answer[longest - len(row) :], alone[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_generate_is_a_hand_written_loop(family: str, method: str) -> None:
    model, ids = tiny_model(family), prompt(45)
    wrapped = longfit.wrap(model, METHODS[method](), budget="20 tokens", chunk_tokens=12)
    expected = wrapped.generate(ids, max_new_tokens=12, **GREEDY, **everything(ids))
    outputs = wrapped(ids, use_cache=True, logits_to_keep=1)
    made = [outputs.logits[:, -1].argmax(-1)]
    for _ in range(11):
        outputs = wrapped(made[-1][None], past_key_values=outputs.past_key_values, use_cache=True)
        made.append(outputs.logits[:, -1].argmax(-1))
    assert torch.equal(torch.cat(made), expected[0, 45:])


@pytest.mark.parametrize("method", METHODS)
def test_asking_does_not_change_the_memory(method: str) -> None:
    model, ids = tiny_model("qwen3"), prompt(50)
    questions = [prompt(5), prompt(9)]
    wrapped = longfit.wrap(model, METHODS[method](), budget="20 tokens", chunk_tokens=16)
    memory = wrapped.compress(ids)
    before = memory.kv_bytes, memory.kept_tokens

    def ask(question: torch.Tensor) -> torch.Tensor:
        return wrapped.generate(question, memory=memory, max_new_tokens=10, **GREEDY)

    first, second = ask(questions[0]), ask(questions[1])
    assert torch.equal(ask(questions[1]), second)
    assert torch.equal(ask(questions[0]), first)
    fresh = wrapped.compress(ids)
    assert torch.equal(wrapped.generate(questions[0], memory=fresh, max_new_tokens=10, **GREEDY), first)
    assert (memory.kv_bytes, memory.kept_tokens) == before
    assert first.shape[1] == 5 + 10


@pytest.mark.parametrize("method", METHODS)
def test_eager_and_sdpa_agree(method: str) -> None:
    ids, answers = prompt(45), []
    for attention in ("eager", "sdpa"):
        model = tiny_model("qwen3", attention=attention)
        wrapped = longfit.wrap(model, METHODS[method](), budget="20 tokens", chunk_tokens=12)
        answers.append(wrapped.generate(ids, max_new_tokens=8, **GREEDY, **everything(ids)))
    assert torch.equal(*answers)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_bfloat16_holds_the_budget(family: str, method: str) -> None:
    model, ids = tiny_model(family, dtype=torch.bfloat16), prompt(45, rows=2)
    wrapped = longfit.wrap(model, METHODS[method](), budget="20 tokens", chunk_tokens=12)
    answer = wrapped.generate(ids, max_new_tokens=8, **GREEDY, **everything(ids))
    assert answer.shape == (2, 53)
    assert 19 <= wrapped.fit_report.kept_tokens <= 20


@pytest.mark.parametrize("method", METHODS)
def test_beams_and_several_samples_run_inside_the_budget(method: str) -> None:
    model, ids = tiny_model("llama"), prompt(45, rows=2)
    wrapped = longfit.wrap(model, METHODS[method](), budget="20 tokens", chunk_tokens=12)
    beams = wrapped.generate(ids, max_new_tokens=8, num_beams=3, **GREEDY, **everything(ids))
    assert beams.shape == (2, 53)
    assert wrapped.fit_report.kept_tokens <= 20
    several = wrapped.generate(ids, max_new_tokens=8, do_sample=True, num_return_sequences=2, **everything(ids))
    assert several.shape == (4, 53)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_turn_compresses_too(method: str) -> None:
    model, ids = tiny_model("llama"), prompt(45)
    wrapped = longfit.wrap(model, METHODS[method](), budget="20 tokens", chunk_tokens=12)
    first = wrapped.generate(ids, max_new_tokens=5, return_dict_in_generate=True, **GREEDY, **everything(ids))
    longer = torch.cat([first.sequences, prompt(40)], 1)
    second = wrapped.generate(
        longer, past_key_values=first.past_key_values, max_new_tokens=5, **GREEDY, **everything(longer)
    )
    assert second.shape == (1, 45 + 5 + 40 + 5)
    assert 19 <= wrapped.fit_report.kept_tokens <= 20
    assert wrapped.fit_report.tokens_in == 94

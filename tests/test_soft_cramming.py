"""Cramming: the loop against a plain one, the ceiling it reaches, the base untouched, and the capacity figures."""

import pytest
import torch

from longfit.compressors.soft import available
from longfit.compressors.soft.capacity import Fit, decoding_capacity, information_gain, measure, token_gain
from longfit.compressors.soft.optimise import cram
from longfit.errors import InputError
from tests.encoders import bound, logits_of, token_ids
from tests.tiny import tiny_model

METHODS = ["cramming", "cramming_kv"]


def short(name="cramming", family="llama", dtype=torch.float32, model=None, **options):
    options = {"ratio": 4, "steps": 60, "learning_rate": 0.1, **options}
    return bound(name, model or tiny_model(family, dtype), **options)


def test_the_loop_is_adamw_on_each_row_with_the_best_step_kept():
    targets, start = token_ids(rows=2, tokens=5, vocabulary=9), torch.randn(2, 1, 6)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(6, 5, 9, generator=generator)
    predict = lambda found: torch.einsum("bme,etv->btv", found[0], weights)  # noqa: E731
    found = cram(predict, targets, [start], steps=7)
    for row in range(2):
        vector = start[row : row + 1].clone().requires_grad_(True)
        adam = torch.optim.AdamW([vector], lr=1e-2, betas=(0.9, 0.9), weight_decay=0.01)
        best = (-1.0, -torch.inf, None)
        for _ in range(8):
            logits, wanted = predict([vector])[0], targets[row]
            loss = torch.nn.functional.cross_entropy(logits, wanted)
            score = float((logits.argmax(-1) == wanted).float().mean()), -loss.item() * 5
            if score > best[:2]:
                best = (*score, vector.detach().clone())
            adam.zero_grad()
            loss.backward()
            adam.step()
        torch.testing.assert_close(found.parameters[0][row : row + 1], best[2], atol=1e-5, rtol=1e-4)
        assert found.accuracy[row] == pytest.approx(best[0]) and float(found.loss[row]) == pytest.approx(-best[1], 1e-4)


def test_a_row_stops_at_accuracy_1_or_without_improvement():
    targets = torch.zeros(1, 3, dtype=torch.long)
    solved = cram(lambda v: torch.eye(4)[:1].expand(1, 3, 4) + 0 * v[0].sum(), targets, [torch.zeros(1, 2)], steps=50)
    stuck = cram(
        lambda v: torch.eye(4)[1:2].expand(1, 3, 4) + 0 * v[0].sum(), targets, [torch.zeros(1, 2)], steps=50, patience=5
    )
    assert (solved.steps, float(solved.accuracy)) == (0, 1.0)
    assert (stuck.steps, float(stuck.accuracy)) == (5, 0.0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("name", METHODS)
def test_the_memory_holds_a_random_text_that_the_model_could_not_know(name, family):
    method = short(name, family, ratio=2, steps=300)
    ids = token_ids(rows=1, tokens=5)
    encoded = method.compress(ids)
    first = 0 if name == "cramming" else 1
    said = method.read(encoded, ids, first=first).argmax(-1)
    assert torch.equal(said, ids[:, first:])
    assert float(method.last.accuracy) == 1.0
    assert encoded.slots == method.slots_for(5) == encoded.next_position == 3
    assert encoded.sources.tolist() == [[0, 2], [2, 4], [4, 5]]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", METHODS)
def test_it_runs_where_gradients_are_off_and_leaves_the_base_as_it_was(name, mode):
    model = tiny_model("llama")
    ids = token_ids()
    frozen = model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = marked = torch.ones_like(model.model.norm.weight)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = logits_of(model, ids)
    method = short(name, model=model, steps=3)
    with mode():
        encoded = method.compress(ids)
        again = method.compress(ids)
    assert all(torch.equal(a, b) for a, b in zip(tensors(encoded), tensors(again), strict=True))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags and frozen.grad is None
    assert [p.grad is marked for p in model.parameters() if p.grad is not None] == [True]
    assert torch.equal(logits_of(model, ids), before)


def tensors(encoded):
    return [encoded.soft] if encoded.soft is not None else [t for entries in encoded.layers for t in entries[:2]]


@pytest.mark.parametrize("name", METHODS)
def test_segments_and_rows_are_independent(name):
    method = short(name, segment_tokens=8, steps=4)
    ids = token_ids(rows=2, tokens=18)
    encoded = method.compress(ids)
    assert encoded.slots == method.slots_for(18) == 2 + 2 + 1
    grown = method.compress(ids[:, 16:], past=method.compress(ids[:, :16]))
    alone = method.compress(ids[1:])
    for all_rows, later, row in zip(tensors(encoded), tensors(grown), tensors(alone), strict=True):
        assert torch.equal(all_rows, later)
        if name == "cramming":  # a key without a gradient moves by Adam's noise, at the full rate
            torch.testing.assert_close(all_rows[1:], row, atol=1e-4, rtol=1e-3)
    if name == "cramming_kv":
        assert encoded.layers[0].positions.tolist() == list(range(5))


def test_bfloat16_memory_is_as_good_as_it_was_measured():
    method = short(dtype=torch.bfloat16, steps=20)
    ids = token_ids(rows=1, tokens=6)
    encoded = method.compress(ids)
    assert encoded.soft.dtype == torch.bfloat16
    right = (method.read(encoded, ids, first=0).argmax(-1) == ids).float().mean()
    assert right == method.last.accuracy[0]


def test_mistakes_are_told():
    for name, options, said in (
        ("cramming", {"steps": 0}, "steps"),
        ("cramming", {"sink_tokens": 1}, "sink_tokens"),
        ("cramming_kv", {"predict_first": True}, "first token"),
    ):
        with pytest.raises(InputError, match=said):
            available()[name](**options)


# -- capacity -------------------------------------------------------------------------------------------------


def test_capacity_is_the_longest_text_that_fits():
    assert decoding_capacity({8: [1.0, 1.0], 16: [1.0, 0.98], 32: [0.9, 1.0]}) == 16
    assert decoding_capacity({8: [0.5], 16: []}) == 0


def test_gains_compare_with_the_model_alone():
    fits = [Fit(10, 10, 2, 0.1, 50.0, 9), Fit(20, 15, 3, 30.0, 90.0, 9), Fit(20, 11, 1, 40.0, 80.0, 9)]
    assert token_gain(fits) == pytest.approx((8 + 12 + 10) / 3)
    assert information_gain(fits) == pytest.approx(50.0)  # the text that fits entirely says nothing of the limit
    assert information_gain(fits[:1]) is None


@pytest.mark.parametrize("name", METHODS)
def test_measuring_gives_both_sides_of_each_text(name):
    method = short(name, steps=30)
    ids = token_ids(rows=2, tokens=9)
    fits = measure(method, ids, 1)
    with torch.no_grad():
        logits = method.backbone.model(ids).logits[:, :-1]
    for row, fit in enumerate(fits):
        alone = torch.nn.functional.cross_entropy(logits[row], ids[row, 1:], reduction="sum")
        assert fit.nats_without == pytest.approx(float(alone), rel=1e-4)
        assert (fit.tokens, fit.correct_without) == (8, int((logits[row].argmax(-1) == ids[row, 1:]).sum()))
        assert fit.nats < fit.nats_without and fit.correct > fit.correct_without

"""The table that a run ends with."""

import pytest

from longfit.compressors.soft.strided_kv import StridedKV
from longfit.errors import InputError
from longfit.training.data import sources
from longfit.training.evaluate import CONDITIONS, evaluate, measure, table_rows
from longfit.training.report import markdown
from tests.tiny_training import loaded


def bound(ratio):
    model, tokenizer = loaded()
    made = sources([{"kind": "lookup", "facts": 3, "asked": 2}], tokenizer, None)
    return StridedKV(ratio=ratio, rank=0).bind(model), [source for _, source in made]


def by_condition(rows, metric="nll"):
    return {row["condition"]: row for row in rows if row["metric"] == metric}


def test_a_memory_of_every_token_is_the_whole_context():
    compressor, made = bound(1)
    rows = by_condition(evaluate(compressor, made, n=4, context_tokens=80, target_tokens=64, batch_size=3))
    assert list(rows) == list(CONDITIONS)
    assert rows["memory"]["slots"] == 80
    assert rows["memory"]["mean"] == pytest.approx(rows["full"]["mean"], abs=1e-4)
    assert rows["truncation"]["mean"] == pytest.approx(rows["full"]["mean"], abs=1e-4)
    assert rows["memory"]["normalised"] == pytest.approx(1, abs=1e-2)
    assert rows["no_context"]["normalised"] == 0
    assert rows["shuffled"]["mean"] != rows["memory"]["mean"]


def test_truncation_has_as_many_tokens_as_the_memory_has_slots():
    compressor, made = bound(4)
    rows = evaluate(compressor, made, n=2, context_tokens=81, target_tokens=64)
    assert {row["slots"] for row in rows} == {21}
    assert all("minus_truncation" in row for row in rows if row["condition"] == "memory")
    assert "| lookup/word | 81 → 21 | nll | truncation, equal slots |" in markdown(rows)


def test_one_sample_cannot_be_shuffled():
    compressor, made = bound(4)
    with pytest.raises(InputError, match="at least 2"):
        evaluate(compressor, made, n=1, context_tokens=81)


def test_scores_by_hand():
    scores = {name: [0.0, 0.0, 0.0, 0.0] for name in CONDITIONS}
    scores |= {"full": [1.0, 1.0, 0.5, 0.5], "memory": [0.5, 0.5, 0.25, 0.25]}
    rows = by_condition(table_rows({"accuracy": scores}), "accuracy")
    assert rows["memory"]["normalised"] == pytest.approx(0.5)
    assert rows["memory"]["minus_truncation"] == pytest.approx(0.375)
    assert rows["memory"]["low"] <= 0.375 <= rows["memory"]["high"]


def test_batches_do_not_change_the_scores():
    from longfit.training.batches import evaluation_episodes

    compressor, made = bound(4)
    episodes = evaluation_episodes(made[0], 5, 80, 64)
    one, _, _ = measure(compressor, episodes, 4, 1)
    many, _, _ = measure(compressor, episodes, 4, 5)
    for condition in CONDITIONS:
        assert one["nll"][condition] == pytest.approx(many["nll"][condition], abs=1e-3)

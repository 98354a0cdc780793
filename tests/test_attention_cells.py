"""Attention patches as cells of a sweep: alone and beside a compressor, shared prefill or not."""

import pytest
import torch

from longfit.attention import available, get
from longfit.errors import InputError, UnknownNameError
from longfit.eval import records, sweep
from longfit.eval.answering import likelihood, wrapped
from longfit.eval.cells import Cell, expand
from longfit.eval.command import Asked, recipe_of
from longfit.eval.summary import summarise
from tests.tiny_sweep import RECIPE, loaded_tiny, own_cache  # noqa: F401

TOPK = {"topk": {"dense_layers": 0}}
CELLS = [
    {"methods": ["full", "no_context"]},
    {"attention": [TOPK, "sliding_window"], "read_tokens": [16, 64]},
    {"methods": [{"snapkv": {"window": 16}}], "keep_ratios": [0.5], "awareness": ["agnostic"], "attention": [TOPK]},
]


def test_cells_have_names_sizes_and_options() -> None:
    cells = {cell.cell_id: cell for cell in expand(CELLS)}
    assert set(cells) == {
        "full",
        "no_context",
        "topk(dense_layers=0)-16read-agnostic",
        "topk(dense_layers=0)-64read-agnostic",
        "sliding_window-16read-agnostic",
        "sliding_window-64read-agnostic",
        "snapkv(window=16)-50%-agnostic+topk(dense_layers=0)",
    }
    assert cells["topk(dense_layers=0)-16read-agnostic"].attends_alone
    assert cells["topk(dense_layers=0)-16read-agnostic"].patch.top_tokens == 16
    assert cells["sliding_window-16read-agnostic"].patch.window_tokens == 13  # and four sinks: 16 beside itself
    assert not cells["snapkv(window=16)-50%-agnostic+topk(dense_layers=0)"].attends_alone
    assert cells["sliding_window-16read-agnostic"].prefills_alone
    assert not cells["topk(dense_layers=0)-16read-agnostic"].prefills_alone


@pytest.mark.parametrize("read_tokens", [256, 512, 1024])
def test_a_size_in_tokens_read_is_one_that_the_patch_takes(read_tokens: int) -> None:
    for name, kind in available().items():
        try:
            options = kind.reading(read_tokens)
        except InputError as error:
            assert "has no size in tokens read" in str(error)
            continue
        get(name, **options)


def test_bad_cells_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="topk"):
        expand([{"attention": ["topkk"]}])
    with pytest.raises(InputError, match="read_tokens"):
        expand([{"attention": ["topk"], "read_tokens": [0]}])
    with pytest.raises(InputError, match="belongs to compressors"):
        expand([{"attention": ["topk"], "budgets": ["25%"]}])
    with pytest.raises(InputError, match="lacks methods, or attention"):
        expand([{"keep_ratios": [0.5]}])


def test_a_shared_prefill_answers_as_each_cell_alone(tmp_path, loaded) -> None:
    recipe = RECIPE | {"cells": CELLS, "n": 2}
    sweep.run(recipe, tmp_path / "alone", loaded=loaded)
    sweep.run(recipe | {"shared_prefill": True}, tmp_path / "shared", loaded=loaded)
    alone, shared = (
        {(r["cell"], r["sample"]): r for r in records.read_records(tmp_path / name)} for name in ("alone", "shared")
    )
    assert alone.keys() == shared.keys()
    assert len(alone) == 7 * 4
    for key, record in alone.items():
        assert record["answer"] == shared[key]["answer"]
        assert record["kept_tokens"] == shared[key]["kept_tokens"]
        assert record.get("read_bytes_per_token") == shared[key].get("read_bytes_per_token")
    few, many = (alone[f"topk(dense_layers=0)-{n}read-agnostic", "niah_single-0000"] for n in (16, 64))
    assert 0 < few["read_bytes_per_token"] < many["read_bytes_per_token"]
    assert many["kept_tokens"] == many["tokens_in"]
    rows = {row["cell"]: row for row in summarise(alone.values()) if row["task"] == "mean"}
    assert rows["topk(dense_layers=0)-16read-agnostic"]["attention"].startswith("topk")


def test_a_likelihood_is_measured_as_the_attention_decodes(loaded) -> None:
    from longfit.eval.answering import Reader
    from longfit.eval.sample import Sample, make_prompt

    model, tokenizer = loaded
    prompt = make_prompt(tokenizer, "", "a long text " * 30, " and then", chat=False)
    sample = Sample("perplexity", "books", 0, prompt, (), max_new_tokens=0, target_ids=tuple(range(40, 60)))

    def nll(cell: Cell) -> list[float]:
        with wrapped(model, cell) as fitted:
            reader = Reader(fitted, tokenizer)
            memory = fitted.compress(reader.tensor(sample.context_ids))
            return likelihood(reader, sample, memory.fork(fitted._fingerprint())).nll

    everything, few = (
        nll(Cell("topk", f"{n} read", attention={"name": "topk", "top_tokens": n, "dense_layers": 0}))
        for n in (4096, 2)
    )
    with torch.no_grad():
        ids = torch.tensor([sample.context_ids + sample.question_ids + sample.target_ids])
        logits = model(ids, use_cache=False).logits[0, -21:-1].log_softmax(-1)
    expected = -logits.gather(-1, torch.tensor(sample.target_ids)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(everything), expected, atol=1e-4)
    assert not torch.allclose(torch.tensor(few), expected, atol=1e-4)


def test_the_command_puts_attentions_beside_methods() -> None:
    asked = Asked("needle", ("niah_single",), compressors=("full",), attention=("topk",), read_tokens=("64", "128"))
    names = [cell.cell_id for cell in recipe_of(asked).expand()]
    assert names == ["full", "no_context", "topk-64read-agnostic", "topk-128read-agnostic"]
    with pytest.raises(UnknownNameError):
        recipe_of(Asked("needle", attention=("nothing",), compressors=("full",)))

"""What holds for every attention patch, from one list."""

import pytest
import torch

import longfit
from longfit.attention import available
from longfit.errors import BudgetError, InputError, UnknownNameError, UnsupportedFeatureError, UnsupportedModelError
from tests.methods import METHODS
from tests.patches import CHOOSES_ITSELF, NARROW, REFUSED_FAMILIES, WIDE, narrow, wide
from tests.tiny import tiny_model

PATCHES = sorted(available())
FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt_neox"]  # GQA, normalised keys, hybrid layers, MHA
PAIRS = [(name, family) for name in PATCHES for family in FAMILIES if family not in REFUSED_FAMILIES.get(name, {})]
REFUSED = [(name, *refused) for name, families in REFUSED_FAMILIES.items() for refused in families.items()]


def prompt(rows: int = 1, tokens: int = 60) -> torch.Tensor:
    return torch.randint(3, 100, (rows, tokens), generator=torch.Generator().manual_seed(5))


def generated(model, ids, **how):
    how = {"max_new_tokens": 9, "do_sample": False, "output_logits": True, "return_dict_in_generate": True} | how
    return model.generate(ids, **how)


def test_every_patch_is_in_the_lists() -> None:
    assert set(WIDE) == set(NARROW) == set(PATCHES)


@pytest.mark.parametrize(("name", "family", "reason"), REFUSED)
def test_what_a_patch_cannot_work_with_is_refused(name: str, family: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        longfit.wrap(tiny_model(family), attention=wide(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_where_everything_is_in_sight_it_is_full_attention(name: str, family: str, dtype: torch.dtype) -> None:
    model, ids = tiny_model(family, dtype), prompt(2)
    expected = generated(model, ids)
    fitted = longfit.wrap(model, attention=wide(name), chunk_tokens=13)
    given = generated(fitted, expected.sequences[:, :60])
    assert torch.equal(given.logits[0].argmax(-1), expected.logits[0].argmax(-1))
    spread = expected.logits[0].float().std()
    assert (given.logits[0] - expected.logits[0]).abs().max() < (1e-4 if dtype == torch.float32 else 0.1) * spread
    if dtype == torch.float32:
        assert torch.equal(given.sequences, expected.sequences)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_padded_row_is_the_row_alone(name: str, family: str) -> None:
    model = longfit.wrap(tiny_model(family), attention=narrow(name), chunk_tokens=16)
    ids = prompt(2)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    together = generated(model, ids * mask, attention_mask=mask)
    for row, start in ((0, 0), (1, 17)):
        alone = generated(model, ids[row : row + 1, start:])
        assert torch.equal(alone.sequences[0, 60 - start :], together.sequences[row, 60:])


@pytest.mark.parametrize("name", PATCHES)
def test_something_is_out_of_sight_and_disabled_is_the_base_model(name: str) -> None:
    model, ids = tiny_model("llama"), prompt()
    base = model(ids, use_cache=False).logits
    fitted = longfit.wrap(model, attention=narrow(name), chunk_tokens=16)
    logits = generated(fitted, ids).logits
    with fitted.disabled():
        plain = generated(fitted, ids).logits
        assert torch.equal(fitted(ids, use_cache=False).logits, base)
    assert not torch.allclose(torch.stack(logits), torch.stack(plain), atol=1e-3)


@pytest.mark.parametrize("method", ["snapkv", "adakv", "streaming_llm", "h2o", "kvzip"])
@pytest.mark.parametrize("name", PATCHES)
def test_with_a_compressor_the_budget_holds(name: str, method: str) -> None:
    compressor = METHODS[method]()
    if name in CHOOSES_ITSELF:
        with pytest.raises(UnsupportedFeatureError, match="compressor"):
            longfit.wrap(tiny_model("llama"), compressor, attention=narrow(name))
        return
    fitted = longfit.wrap(tiny_model("llama"), compressor, budget="40 tokens", attention=narrow(name), chunk_tokens=16)
    generated(fitted, prompt(1, 90))
    assert 0 < fitted.fit_report.kept_tokens <= 40
    assert name.replace("_", "") in fitted.fit_report.attention.lower()


@pytest.mark.parametrize("name", PATCHES)
def test_what_no_query_can_see_is_not_stored(name: str) -> None:
    patch = narrow(name)
    fitted = longfit.wrap(tiny_model("llama"), attention=patch, chunk_tokens=16)
    generated(fitted, prompt(1, 150))
    kept = fitted.fit_report.kept_per_layer
    for layer, n in enumerate(kept):
        assert n <= patch.most_kept(layer, len(kept))
    if patch.stores == "everything":
        assert all(n == 158 for n in kept)


@pytest.mark.parametrize("name", PATCHES)
def test_beams_memories_and_chunks_of_any_size(name: str) -> None:
    model, ids = tiny_model("llama"), prompt(1, 64)
    fitted = longfit.wrap(model, attention=narrow(name), chunk_tokens=16)
    fitted.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False)
    memory = fitted.compress(ids[:, :48])
    first = generated(fitted, ids[:, 48:], memory=memory).sequences
    again = generated(fitted, ids[:, 48:], memory=memory).sequences
    assert torch.equal(first, again)
    whole = generated(fitted, ids).sequences
    assert torch.equal(whole[:, 64:], first[:, 16:])


def test_a_window_alone_takes_inputs_past_the_trained_window() -> None:
    """512 positions were trained; nothing names a budget, the window is one."""
    fitted = longfit.wrap(tiny_model("llama"), attention="sliding_window", window_tokens=40, chunk_tokens=64)
    generated(fitted, prompt(1, 900))
    assert fitted.fit_report.geometry == "packed"
    assert fitted.fit_report.kept_tokens <= fitted.longfit.patch.most_kept(0, 2)


def test_names_and_options_are_checked() -> None:
    model = tiny_model("llama")
    with pytest.raises(UnknownNameError, match="sliding_window"):
        longfit.wrap(model, attention="sliding_windows")
    with pytest.raises(InputError, match="window_tokens"):
        longfit.wrap(model, attention="sliding_window", window_tokens=0)
    with pytest.raises(InputError, match="no option"):
        longfit.wrap(model, attention="sliding_window", pages=3)
    with pytest.raises(InputError, match="AttentionPatch"):
        longfit.wrap(model, attention=3)


def test_a_model_without_full_attention_is_refused() -> None:
    model = tiny_model("mistral", sliding_window=8)
    with pytest.raises(UnsupportedModelError, match="full-attention"):
        longfit.wrap(model, attention="sliding_window")


def test_a_budget_that_does_not_hold_what_is_in_sight_is_refused() -> None:
    fitted = longfit.wrap(tiny_model("llama"), attention="sliding_window", window_tokens=40, budget="20 tokens")
    with pytest.raises(BudgetError, match="looks at up to"):
        generated(fitted, prompt(1, 90))

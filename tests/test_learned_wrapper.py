"""Learned compressors behind wrap: generate, compress, memories, batches, budgets.

Every learned method in every form runs on every family that longfit calls tested. `qd_lcirc`, which has to be told the
question, has its test in test_memory_file.
"""

import pytest
import torch

import longfit
from longfit.compressors import get
from longfit.errors import BudgetError, InputError, UnsupportedFeatureError
from longfit.families import TESTED
from tests.soft_models import FOREIGN, METHODS, OPTIONS, form, move
from tests.tiny import tiny_model

CASES = [*METHODS, *FOREIGN]
EVERY_FAMILY = sorted(TESTED)
HOW = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def learned(case: str, **options):
    """A method of the lists of tests/soft_models.py, as `wrap` takes it."""
    name, own = form(case)
    return get(name, **{**OPTIONS, **own, "segment_tokens": 12, "window_tokens": 4, **options})


def moved(case: str, family: str):
    """The family's tiny model, wrapped; the method's weights are away from where they start, so that all of them act
    (adapters and gates start at zero)."""
    model = longfit.wrap(tiny_model(family), learned(case))
    move(model.longfit.encoder)
    return model


def prompt(B: int = 1, T: int = 45, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 90, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("name", CASES)
def test_generate_is_the_reader_step_by_step(name, family):
    wrapped, ids = moved(name, family), prompt()
    out = wrapped.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    bound = wrapped.longfit.encoder
    with wrapped.disabled(), torch.no_grad():
        encoded = bound.compress(ids[:, :-4])
        given = ids[:, -4:]
        for _ in range(5):
            extra = torch.cat([given, given[:, :1]], 1)  # read predicts up to the last; the last id says nothing
            given = torch.cat([given, bound.read(encoded, extra)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out[:, 45:], given[:, 4:])
    assert wrapped.fit_report.tokens_in == 45 + 4
    if bound.memory != "cross":
        assert wrapped.fit_report.kept_tokens == bound.slots_for(41) + 4 + 4


@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("name", CASES)
def test_a_memory_answers_as_the_whole_prompt_does_and_never_changes(name, family):
    model, ids = moved(name, family), prompt()
    whole = model.generate(ids, question_tokens=7, **HOW)[:, 45:]
    memory = model.compress(ids[:, :38])
    first = model.generate(ids[:, 38:], memory=memory, **HOW)[:, 7:]
    other = model.generate(prompt(1, 6, 5), memory=memory, **HOW)
    again = model.generate(ids[:, 38:], memory=memory, **HOW)[:, 7:]
    assert torch.equal(first, again) and torch.equal(first, whole)
    assert torch.equal(other, model.generate(prompt(1, 6, 5), memory=memory, **HOW))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", CASES)
class TestMemories:
    def test_a_padded_batch_is_its_rows_alone(self, name, family):
        model = moved(name, family)
        ids, mask = prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
        mask[0, :7], ids[0, :7] = 0, 0
        if model.longfit.encoder.memory == "cross":
            with pytest.raises(UnsupportedFeatureError, match="equal length"):
                model.generate(ids, attention_mask=mask, **HOW)
            return
        both = model.generate(ids, attention_mask=mask, **HOW)[:, 40:]
        for row, padding in ((0, 7), (1, 0)):
            alone = model.generate(ids[row : row + 1, padding:], **HOW)[:, 40 - padding :]
            assert torch.equal(both[row : row + 1], alone)

    def test_beams_and_several_answers(self, name, family):
        model, ids = moved(name, family), prompt(2, 40)
        how = {**HOW, "num_beams": 3}
        both = model.generate(ids, **how)
        for row in range(2):
            assert torch.equal(both[row : row + 1], model.generate(ids[row : row + 1], **how))

    def test_disabled_and_unwrapped_are_the_base_model(self, name, family):
        model = tiny_model(family)
        ids = prompt()
        with torch.no_grad():
            before = model(ids).logits
            longfit.wrap(model, learned(name))
            move(model.longfit.encoder)
            with model.disabled():
                assert torch.equal(model(ids).logits, before)
            longfit.unwrap(model)
            assert torch.equal(model(ids).logits, before)
        assert not [module for module in model.modules() if "lora" in type(module).__module__]


class TestBudgets:
    def test_an_input_that_fits_stays_raw(self):
        model = longfit.wrap(tiny_model("llama"), learned("strided_kv", ratio=4), budget="60 tokens")
        plain = tiny_model("llama").generate(prompt(), max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(model.generate(prompt(), max_new_tokens=5, do_sample=False, pad_token_id=0), plain)
        assert model.fit_report.kept_tokens == 49

    @pytest.mark.parametrize("budget", [60, 30, 17])
    def test_the_lowest_ratio_that_fits_is_taken_and_the_budget_holds(self, budget):
        model = longfit.wrap(tiny_model("llama"), learned("strided_kv", ratio=2), budget=f"{budget} tokens")
        model.compress(prompt(1, 100))
        kept = model.fit_report.kept_tokens
        assert kept <= budget
        finer = [r for r in range(2, 40) if 4 + model.longfit.encoder.slots_for(96, r) <= budget]
        assert kept == 4 + model.longfit.encoder.slots_for(96, finer[0])

    def test_a_budget_that_no_ratio_meets_is_refused_with_the_smallest_that_would_do(self):
        model = longfit.wrap(tiny_model("llama"), learned("strided_kv", ratio=4), budget="8 tokens")
        with pytest.raises(BudgetError, match="smallest that would do"):
            model.compress(prompt(1, 200))

    def test_a_pipeline_trims_the_memory(self):
        model = longfit.wrap(
            tiny_model("llama"), [learned("strided_kv", ratio=4), get("snapkv", window=4)], budget="12 tokens"
        )
        model.generate(prompt(1, 100), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert model.fit_report.kept_tokens <= 12
        assert "strided_kv" in model.fit_report.method.lower() or "StridedKV" in model.fit_report.method


class TestRefusals:
    def test_another_method_or_other_weights_refuse_a_memory(self):
        model = tiny_model("llama")
        memory = longfit.wrap(model, learned("strided_kv", ratio=4)).compress(prompt())
        longfit.wrap(model, learned("strided_kv", ratio=8))
        with pytest.raises(longfit.errors.FingerprintError):
            model.generate(prompt(1, 4), memory=memory)
        longfit.wrap(model, learned("strided_kv", ratio=4))
        with torch.no_grad():
            model.longfit.encoder.lora.parameters("encoder")[0].add_(1.0)
        with pytest.raises(longfit.errors.FingerprintError):
            model.generate(prompt(1, 4), memory=memory)

    def test_embeddings_have_no_ids_to_compress(self):
        model = longfit.wrap(tiny_model("llama"), learned("strided_kv", ratio=4))
        with pytest.raises(UnsupportedFeatureError, match="inputs_embeds"):
            model(inputs_embeds=model.get_input_embeddings()(prompt()))

    def test_past_the_window_a_method_with_the_texts_positions_refuses(self):
        model = longfit.wrap(tiny_model("llama", max_position_embeddings=64), learned("strided_kv", ratio=4))
        with pytest.raises(UnsupportedFeatureError, match="window"):
            model.compress(prompt(1, 80))

    @pytest.mark.parametrize("steps", [["snapkv", "strided_kv"], ["strided_kv", "strided_kv"], ["strided_kv", "kvzip"]])
    def test_pipelines_that_cannot_work(self, steps):
        with pytest.raises(UnsupportedFeatureError):
            longfit.wrap(tiny_model("llama"), steps, budget="12 tokens")

    def test_options_that_cannot_be(self):
        with pytest.raises(InputError, match="ratio"):
            get("strided_kv", ratio=0)
        with pytest.raises(InputError, match="geometry"):
            longfit.wrap(tiny_model("llama"), learned("strided_kv", ratio=4), geometry="packed")


@pytest.mark.parametrize("name", [name for name in CASES if get(form(name)[0]).memory == "soft"])
def test_without_a_window_every_token_becomes_slots_and_one_stays_to_be_answered_from(name, tmp_path):
    model = longfit.wrap(tiny_model("llama"), learned(name, window_tokens=0))
    ids = prompt()
    memory = model.compress(ids[:, :38])
    assert model.fit_report.kept_tokens == model.longfit.encoder.slots_for(38)
    first = model.generate(ids[:, 38:], memory=memory, **HOW)[:, 7:]
    assert torch.equal(first, model.generate(ids, question_tokens=7, **HOW)[:, 45:])
    memory.save(tmp_path / "m")
    loaded = longfit.Memory.load(tmp_path / "m", model)
    assert torch.equal(first, model.generate(ids[:, 38:], memory=loaded, **HOW)[:, 7:])
    model.generate(ids, **HOW)
    assert model.fit_report.kept_tokens == model.longfit.encoder.slots_for(44) + 1 + 3

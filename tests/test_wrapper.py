"""The wrapped object stays a PreTrainedModel: everything around it goes on working, or refuses by name."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, TextIteratorStreamer, pipeline
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList

import longfit
from longfit.errors import (
    BudgetError,
    FingerprintError,
    InputError,
    UnknownNameError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from tests.tiny import tiny_model
from tests.words import word_tokenizer

GREEDY = {"do_sample": False, "max_new_tokens": 6}


def prompt(tokens: int = 45) -> dict:
    ids = torch.randint(3, 100, (1, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def fitted(family: str = "llama", budget: str = "20 tokens", **options):
    return longfit.wrap(tiny_model(family), "streaming_llm", budget=budget, chunk_tokens=12, **options)


def test_class_name_and_type_survive() -> None:
    model = tiny_model("llama")
    base = type(model)
    wrapped = longfit.wrap(model, "knorm", budget="20 tokens")
    assert wrapped is model
    assert isinstance(wrapped, PreTrainedModel)
    assert isinstance(wrapped, base)
    assert type(wrapped).__name__ == base.__name__
    longfit.unwrap(wrapped)
    assert type(model) is base
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model, "longfit")


def test_two_wrapped_models_do_not_meet() -> None:
    first, second, plain = fitted(), fitted(budget="30 tokens"), tiny_model("llama")
    given = prompt()
    expected = plain(**given).logits
    first.generate(**given, **GREEDY)
    second.generate(**given, **GREEDY)
    assert (first.fit_report.limit_tokens, second.fit_report.limit_tokens) == (20, 30)
    assert torch.equal(plain(**given).logits, expected)


def test_pipeline_streamer_and_stopping_criteria() -> None:
    tokenizer, model = word_tokenizer(), fitted()
    text = " ".join(f"w{i % 90}" for i in range(60))
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)(text, **GREEDY)
    assert answer[0]["generated_text"].startswith("w0 w1")
    assert model.fit_report.kept_tokens <= 20
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    given = tokenizer(text, return_tensors="pt")
    model.generate(**given, **GREEDY, streamer=streamer)
    assert len("".join(streamer).split()) == 6
    stop = StoppingCriteriaList([MaxLengthCriteria(given.input_ids.shape[1] + 2)])
    assert model.generate(**given, **GREEDY, stopping_criteria=stop).shape[1] == given.input_ids.shape[1] + 2


def test_saved_model_is_the_base_model(tmp_path) -> None:
    model, given = fitted(), prompt(10)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with model.disabled():
        assert torch.equal(again(**given).logits, model(**given).logits)
    assert again.config.architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize("wrap_first", [True, False])
def test_peft_above_and_below(wrap_first: bool) -> None:
    model, given = tiny_model("llama"), prompt()
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if wrap_first:
        longfit.wrap(model, "streaming_llm", budget="20 tokens", chunk_tokens=12)
        model = get_peft_model(model, config)
    else:
        model = longfit.wrap(get_peft_model(model, config), "streaming_llm", budget="20 tokens", chunk_tokens=12)
    answer = model.generate(**given, **GREEDY)
    assert answer.shape == (1, 51)
    assert 19 <= model.fit_report.kept_tokens <= 20


def test_training_forward_is_the_base_models() -> None:
    model = fitted().train()
    given = prompt(30)
    loss = model(**given, labels=given["input_ids"]).loss
    loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_two_device_map(tmp_path) -> None:
    plain = tiny_model("llama")
    plain.save_pretrained(tmp_path)
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    split = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "off")
    given = prompt()
    answers = [
        longfit.wrap(m, "snapkv", window=6, budget="20 tokens", chunk_tokens=12).generate(
            **given, **GREEDY, pad_token_id=0, eos_token_id=None
        )
        for m in (plain, split)
    ]
    assert torch.equal(*answers)


def test_sampling_is_seeded_as_the_base_models() -> None:
    model, given = fitted(budget="100%"), prompt()
    how = {"do_sample": True, "max_new_tokens": 6, "top_k": 20}
    torch.manual_seed(3)
    ours = model.generate(**given, **how)
    with model.disabled():
        torch.manual_seed(3)
        assert torch.equal(model.generate(**given, **how), ours)


def test_one_token_and_empty_input() -> None:
    model = fitted()
    assert model.generate(**prompt(1), **GREEDY).shape == (1, 7)
    with pytest.raises(InputError, match="empty"):
        model.generate(torch.empty(1, 0, dtype=torch.long), **GREEDY)
    with pytest.raises(InputError, match="token ids"):
        model.generate(torch.ones(1, 4), **GREEDY)
    with pytest.raises(InputError, match="empty"):
        model.compress(torch.empty(1, 0, dtype=torch.long))


def test_padding_on_the_wrong_side() -> None:
    model, given = fitted(), prompt()
    given["attention_mask"][:, -3:] = 0
    with pytest.raises(InputError, match="left"):
        model.generate(**given, **GREEDY)
    given["attention_mask"][:] = 0
    with pytest.raises(InputError, match="no token"):
        model.generate(**given, **GREEDY)


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"past_key_values": DynamicCache()},
        {"prefill_chunk_size": 4},
    ],
)
def test_calls_that_cannot_work_are_refused(arguments: dict) -> None:
    with pytest.raises(UnsupportedFeatureError):
        fitted().generate(**prompt(), **GREEDY, **copy.copy(arguments))


def test_attention_weights_are_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match="output_attentions"):
        fitted()(**prompt(), use_cache=True, output_attentions=True)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="snapkv"):
        longfit.wrap(tiny_model("llama"), "snapvk", budget="20 tokens")
    with pytest.raises(InputError, match="window"):
        longfit.wrap(tiny_model("llama"), "snapkv", budget="20 tokens", windw=3)
    with pytest.raises(InputError, match="scorer"):
        longfit.wrap(tiny_model("llama"), "adakv", scorer="kvzip", budget="20 tokens")


def test_budgets_that_cannot_be_met_are_refused_before_any_work() -> None:
    model = tiny_model("llama")
    with pytest.raises(BudgetError, match="64 tokens"):
        longfit.wrap(model, "snapkv", budget="20 tokens")
    with pytest.raises(BudgetError, match="smallest"):
        longfit.wrap(model, "knorm", budget="1KiB")
    with pytest.raises(BudgetError, match="weights"):
        longfit.wrap(model, "knorm", total="1KiB")
    with pytest.raises(BudgetError):
        longfit.wrap(model, "knorm", budget="lots")
    assert type(model).__mro__[1].__name__ != "FitMixin"
    wrapped = longfit.wrap(model, "snapkv", budget="10%")
    with pytest.raises(BudgetError, match="smallest"):
        wrapped.generate(**prompt(), **GREEDY)


@pytest.mark.parametrize("budget", ["512KiB", "1MiB"])
def test_a_budget_in_bytes_is_what_is_allocated(budget: str) -> None:
    model = longfit.wrap(tiny_model("llama", max_position_embeddings=8192), "knorm", budget=budget)
    model.generate(**prompt(3000), **GREEDY)
    report = model.fit_report
    limit = longfit.budget.parse_bytes(budget)
    made = model.longfit.plan(packed=report.geometry == "packed")
    assert report.kept_tokens == pytest.approx(made.kept_tokens, rel=0.02)
    assert report.kv_bytes + made.working_set_bytes <= limit
    assert report.kv_bytes + made.working_set_bytes >= 0.97 * limit


def test_models_that_cannot_be_wrapped_are_refused_by_name() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, T5Config

    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        longfit.wrap(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)), "knorm", budget="9%")
    soft = Gemma2Config(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    with pytest.raises(UnsupportedModelError, match="soft-capped"):
        longfit.wrap(Gemma2ForCausalLM(soft), "knorm", budget="9%")
    with pytest.raises(UnsupportedModelError, match="PreTrainedModel"):
        longfit.wrap(torch.nn.Linear(1, 1), "knorm", budget="9%")
    assert T5Config is not None


def test_an_untested_family_is_checked_on_the_spot() -> None:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
    )
    model = longfit.wrap(Olmo2ForCausalLM(config).eval(), "knorm", budget="20 tokens", chunk_tokens=12)
    assert model.generate(**prompt(), **GREEDY).shape == (1, 51)


def test_sliding_models_stay_as_they_are() -> None:
    model, given = tiny_model("mistral", sliding_window=16), prompt()
    expected = model.generate(**given, **GREEDY)
    wrapped = longfit.wrap(model, "knorm", budget="64 tokens", chunk_tokens=12)
    assert torch.equal(wrapped.generate(**given, **GREEDY), expected)
    with pytest.raises(BudgetError, match="16 tokens"):
        longfit.wrap(model, "knorm", budget="8 tokens")
    with pytest.raises(UnsupportedModelError, match="sliding"):
        longfit.wrap(model, "knorm", budget="50%")


def test_switching_rope_is_refused_past_its_window() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=40)
    wrapped = longfit.wrap(model, "knorm", budget="20 tokens", chunk_tokens=12, geometry="original")
    with pytest.raises(UnsupportedModelError, match="packed"):
        wrapped.generate(**prompt(60), **GREEDY)
    assert wrapped.generate(**prompt(20), **GREEDY).shape == (1, 26)


def test_memories_of_another_model_are_refused() -> None:
    memory = fitted().compress(prompt()["input_ids"])
    other = longfit.wrap(tiny_model("llama"), "knorm", budget="20 tokens")
    with pytest.raises(FingerprintError, match="compress"):
        other.generate(**prompt(3), memory=memory, **GREEDY)


def test_nan_scores_are_an_error() -> None:
    model = tiny_model("llama")
    model.model.layers[0].self_attn.k_proj.weight.data[0] = float("nan")
    with pytest.raises(longfit.errors.ScoreError, match="NaN"):
        longfit.wrap(model, "knorm", budget="20 tokens", chunk_tokens=12).generate(**prompt(), **GREEDY)


def test_report_before_any_run_and_its_forms() -> None:
    model = fitted()
    with pytest.raises(InputError, match="nothing has run"):
        _ = model.fit_report
    model.generate(**prompt(), **GREEDY)
    report = model.fit_report
    assert report.to_dict()["kept_tokens"] == report.kept_tokens
    assert "20 of 50 tokens" in str(report)
    assert report.chunks == 4
    assert len(report.kept_per_layer) == 2
    assert report.peak_bytes is not None


def test_a_new_method_is_one_class() -> None:
    from dataclasses import dataclass

    from longfit.compressors import KVCompressor, available

    @dataclass
    class Oldest(KVCompressor):
        name = "oldest_toy"

        def score(self, view):
            return -view.positions.float()

    try:
        assert "oldest_toy" in available()
        model = longfit.wrap(tiny_model("llama"), "oldest_toy", budget="20 tokens", chunk_tokens=12)
        memory = model.compress(prompt()["input_ids"])
        assert memory.cache.bounded[0].parts[0].store.positions[0, 0].tolist() == list(range(20))
    finally:
        from longfit.compressors import base

        base._REGISTRY.pop("oldest_toy")


def test_a_method_that_chooses_wrongly_is_an_error() -> None:
    from dataclasses import dataclass

    from longfit.compressors import Knorm

    @dataclass
    class Greedy(Knorm):
        def select(self, views, scores, n_keep):
            return super().select(views, scores, n_keep + 1)

    model = longfit.wrap(tiny_model("llama"), Greedy(), budget="20 tokens", chunk_tokens=12)
    with pytest.raises(longfit.errors.ScoreError, match="kept 21"):
        model.compress(prompt()["input_ids"])

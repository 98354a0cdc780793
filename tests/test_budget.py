"""Budgets and plans: what users may write, what is refused, and that a plan keeps and uses its budget."""

import json
import random
import re
from dataclasses import asdict

import pytest
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from longfit.budget import (
    MemoryBudget,
    ModelShape,
    entry_bytes,
    exact_bytes,
    format_bytes,
    kept_for_ratio,
    parse_bytes,
    parse_tokens,
    plan,
)
from longfit.errors import BudgetError, InputError, UnsupportedModelError

MIB = 2**20
SMALL = dict(
    vocab_size=320, hidden_size=64, intermediate_size=112, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama with biases, tied": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama with its own head size": LlamaConfig(**SMALL, head_dim=24),
    "mistral": MistralConfig(**SMALL, sliding_window=None, head_dim=16),
    "qwen2": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=32, max_window_layers=2),
    "qwen3": Qwen3Config(**SMALL, head_dim=32),
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        mlp_only_layers=[1],
    ),
    "gemma3_text": Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=64),
    "phi3": Phi3Config(**SMALL, sliding_window=None),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=320, hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
    ),
}


def smollm2(**changes: object) -> ModelShape:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return ModelShape.from_config(config, **changes)  # type: ignore[arg-type]


def gemma3(layers: int = 6) -> ModelShape:
    config = Gemma3TextConfig(
        vocab_size=1000, hidden_size=640, intermediate_size=2048, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512,
    )  # fmt: skip
    return ModelShape.from_config(config, dtype_bytes=2)


# -- what users write ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("64MiB", "budget_bytes", 64 * MIB),
        ("1.5 GB", "budget_bytes", 1_500_000_000),
        (" 512kib ", "budget_bytes", 512 * 1024),
        ("4096 bytes", "budget_bytes", 4096),
        ("2048 tokens", "kept_tokens", 2048),
        ("1 token", "kept_tokens", 1),
        ("2k tokens", "kept_tokens", 2000),
        ("1.5K tokens", "kept_tokens", 1500),
        ("120k tokens", "kept_tokens", 120_000),
        ("25%", "keep_ratio", 0.25),
        ("0.7 %", "keep_ratio", 0.007),
        ("100%", "keep_ratio", 1.0),
        ("total=2GiB", "total_bytes", 2 * 2**30),
    ],
)
def test_budget_texts(text: str, field: str, value: float) -> None:
    budget = MemoryBudget.parse(text)
    assert {name: given for name, given in asdict(budget).items() if given is not None} == {field: value}


@pytest.mark.parametrize(
    "text",
    ["", "64", "64 parrots", "-1MiB", "tokens", "1.5 tokens", "101%", "64MiB 2", "NaN%", "1e3 tokens", "2G"],
)
def test_an_unreadable_budget_shows_what_can_be_written(text: str) -> None:
    with pytest.raises(BudgetError, match=r'"64MiB".*"2048 tokens".*"25%".*total="2GiB"'):
        MemoryBudget.parse(text)


@pytest.mark.parametrize("text", ["25%", "100 tokens", "2", "total=1GiB"])
def test_a_total_is_in_bytes(text: str) -> None:
    with pytest.raises(BudgetError, match='total="2GiB"'):
        MemoryBudget.parse(total=text)


def test_one_of_budget_and_total() -> None:
    assert MemoryBudget.parse(total="2GiB") == MemoryBudget(total_bytes=2 * 2**30)
    for arguments in ((), ("64MiB", "2GiB"), (MemoryBudget(kept_tokens=4), "2GiB")):
        with pytest.raises(BudgetError):
            MemoryBudget.parse(*arguments)
    with pytest.raises(BudgetError, match='did you mean "2048 tokens"'):
        MemoryBudget.parse(2048)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="exactly one"):
        MemoryBudget(budget_bytes=3, kept_tokens=4)


def test_a_budget_reads_back_what_it_prints() -> None:
    dice = random.Random(0)
    budgets = [MemoryBudget.parse(text) for text in ("64MiB", "1 token", "0.7%", "100%", "total=3GiB")]
    for _ in range(300):
        budgets.append(MemoryBudget(budget_bytes=dice.randrange(2 ** dice.randrange(1, 45))))
        budgets.append(MemoryBudget(total_bytes=dice.randrange(2**40)))
        budgets.append(MemoryBudget(kept_tokens=dice.randrange(10**7)))
        budgets.append(MemoryBudget(keep_ratio=dice.random()))
    for budget in budgets:
        assert MemoryBudget.parse(str(budget)) == budget
        assert eval(repr(budget)) == budget
        assert MemoryBudget.parse(budget) is budget


def test_sizes_and_token_counts() -> None:
    assert parse_bytes("1.5KiB") == 1536 and exact_bytes(1536) == "1536B" and exact_bytes(3 * MIB) == "3MiB"
    assert [format_bytes(size) for size in (1536, 17, 250 * MIB)] == ["1.50 KiB", "17 B", "250 MiB"]
    read = [parse_tokens(text) for text in ("120k", "4,096", 7, "2 tokens", "1.5m")]
    assert read == [120_000, 4096, 7, 2, 1_500_000]
    for bad in ("", "1.5", "many", 0, "-3", True):
        with pytest.raises(InputError):
            parse_tokens(bad)
    with pytest.raises(BudgetError):
        parse_bytes("64")


def test_a_share_is_floored_as_the_decimal_that_was_written() -> None:
    assert [kept_for_ratio(100, ratio) for ratio in (0.29, 0.1, 0.999, 0.001, 1.0)] == [29, 10, 99, 1, 100]
    assert kept_for_ratio(3, 0.25) == 1


# -- shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_parameters_are_counted_exactly(family: str) -> None:
    config = CONFIGS[family]
    built = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    shape = ModelShape.from_config(config, dtype_bytes=2)
    assert shape.parameters == built
    assert shape.weights_bytes == 2 * built
    assert ModelShape.from_config(config.to_dict(), dtype_bytes=2) == shape


def test_layers_are_told_apart() -> None:
    assert (gemma3().full_layers, gemma3().sliding_layers, gemma3().sliding_window) == (1, 5, 512)
    qwen2 = ModelShape.from_config(CONFIGS["qwen2"])
    assert (qwen2.full_layers, qwen2.sliding_layers) == (2, 2)
    nested = {"model_type": "gemma3", "text_config": CONFIGS["gemma3_text"].to_dict()}
    assert ModelShape.from_config(nested) == ModelShape.from_config(CONFIGS["gemma3_text"])
    with pytest.raises(UnsupportedModelError, match="chunked_attention"):
        ModelShape.from_config({**LlamaConfig(**SMALL).to_dict(), "layer_types": ["chunked_attention"] * 4})


def test_an_unknown_family_needs_its_weights() -> None:
    fields = {**LlamaConfig(**SMALL).to_dict(), "model_type": "olmo2"}
    with pytest.raises(UnsupportedModelError, match="weights_bytes"):
        ModelShape.from_config(fields)
    assert ModelShape.from_config(fields, weights_bytes=123).weights_bytes == 123


def test_entry_bytes_of_smollm2() -> None:
    assert entry_bytes(smollm2(dtype_bytes=2)) == 3 * (2 * 64 * 2 + 4)
    assert entry_bytes(smollm2(dtype_bytes=2), entry_state_bytes=4) == 3 * (2 * 64 * 2 + 8)


# -- plans ---------------------------------------------------------------------------------------------------


def random_case(dice: random.Random) -> dict[str, object]:
    return {
        "shape": dice.choice([smollm2(), smollm2(dtype_bytes=2), gemma3(), gemma3(26)]),
        "tokens": dice.choice([1, 50, 1000, 20_000, 120_000]),
        "batch_size": dice.choice([1, 1, 3]),
        "max_chunk_tokens": dice.choice([256, 2048]),
        "entry_state_bytes": dice.choice([0, 4]),
        "layer_state_bytes": dice.choice([0, 147_456]),
        "score_workspace": dice.choice([0, 10**6, lambda chunk, kept: 36 * (chunk + kept)]),
        "min_tokens": dice.choice([1, 68]),
        "new_tokens": dice.choice([0, 64]),
    }


def test_a_byte_budget_is_held_and_used() -> None:
    dice = random.Random(1)
    for _ in range(300):
        case = random_case(dice)
        limit = dice.randrange(60, 800) * MIB
        weights = case["shape"].weights_bytes  # type: ignore[attr-defined]
        for budget in (f"{limit}B", f"total={limit + weights}B"):
            made = plan(**case, budget=budget)  # type: ignore[arg-type]
            assert made.fits and made.prefill_peak_bytes <= limit
            assert made.prefill_peak_bytes == made.kv_kept_bytes + made.working_set_bytes
            assert made.total_peak_bytes == made.prefill_peak_bytes + weights
            if made.dropped_tokens:
                assert made.prefill_peak_bytes >= 0.98 * limit
                assert made.kept_tokens >= 68


def test_the_smallest_budget_named_is_exact() -> None:
    dice = random.Random(2)
    for index in range(400):
        case = random_case(dice)
        zero = ["0B", "total=0B", "0 tokens", "0%"][index % 4]
        with pytest.raises(BudgetError) as refused:
            plan(**case, budget=zero)  # type: ignore[arg-type]
        forms = r"total=\d+\w+|\d+ tokens?|[\d.]+%|\d+\w+"
        named = re.search(rf"smallest that would do is ({forms})", str(refused.value))
        assert named, str(refused.value)
        smallest = MemoryBudget.parse(named[1])
        made = plan(**case, budget=smallest)  # type: ignore[arg-type]
        assert made.kept_tokens >= min(case["min_tokens"], case["tokens"] + case["new_tokens"])  # type: ignore[operator]
        if smallest.keep_ratio is not None:
            less = MemoryBudget(keep_ratio=max(0.0, round(smallest.keep_ratio - 0.0001, 6)))
        else:
            less = MemoryBudget(**{k: v - 1 for k, v in asdict(smallest).items() if v is not None})
        with pytest.raises(BudgetError, match="smallest that would do"):
            plan(**case, budget=less)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ("total=100MiB", "weights alone take 513 MiB"),
        ("total=513MiB", "weights alone take 513 MiB|one chunk"),
        ("1KiB", "one chunk of 64 tokens alone"),
        ("4MiB", "fewer than the 68 tokens"),
        ("67 tokens", "has to keep 68 tokens"),
        ("0.05%", "keeps 60 of 120,000 tokens"),
        ("0%", "keeps 0 of"),
    ],
)
def test_refusals_say_why(budget: str, reason: str) -> None:
    with pytest.raises(BudgetError, match=reason):
        plan(smollm2(), tokens="120k", budget=budget, min_tokens=68)


def test_sliding_layers_come_off_first() -> None:
    shape, per_token = gemma3(12), 1 * 2 * 256 * 2
    long, longer = (plan(shape, tokens=t, budget="32MiB") for t in ("100k", "200k"))
    assert long.kept_tokens == longer.kept_tokens
    sliding = 10 * 512 * per_token
    assert long.kv_kept_bytes == sliding + 2 * long.kept_tokens * (per_token + 4)
    assert long.kv_full_bytes == sliding + 2 * 100_000 * per_token
    only_sliding = ModelShape.from_config(MistralConfig(**SMALL, sliding_window=32), dtype_bytes=4)
    assert only_sliding.full_layers == 0
    assert plan(only_sliding, tokens=5000, budget="8MiB").dropped_tokens == 0
    stored = plan(only_sliding, tokens=5000, budget="8MiB", max_chunk_tokens=64).prefill_peak_bytes
    with pytest.raises(BudgetError, match=r"sliding-window layers alone|one chunk"):
        plan(only_sliding, tokens=5000, budget=MemoryBudget(budget_bytes=stored - 1))


def test_nothing_is_dropped_when_everything_fits() -> None:
    for budget in ("2GiB", "5000 tokens", "100%", "total=3GiB"):
        made = plan(smollm2(), tokens=1000, budget=budget, new_tokens=24)
        assert (made.kept_tokens, made.keep_ratio, made.dropped_tokens) == (1024, 1.0, 0)


def test_chunks_follow_the_budget() -> None:
    assert plan(smollm2(), tokens="100k", budget="2000 tokens").chunk_tokens == 2048
    assert plan(smollm2(), tokens="100k", budget="10%", max_chunk_tokens=512).chunk_tokens == 512
    assert plan(smollm2(), tokens=100, budget="10%").chunk_tokens == 128
    assert plan(smollm2(), tokens=100, budget="10%", chunk_tokens=33).chunk_tokens == 33
    budgets = [f"{mib}MiB" for mib in (8, 16, 32, 64, 128, 512)]
    sizes = [plan(smollm2(), tokens="100k", budget=budget).chunk_tokens for budget in budgets]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == 2048
    with pytest.raises(BudgetError, match="at least 1"):
        plan(smollm2(), tokens=10, budget="10%", chunk_tokens=0)


def test_the_peak_does_not_depend_on_the_input() -> None:
    peaks = {plan(smollm2(), tokens=t, budget="64MiB").prefill_peak_bytes for t in ("20k", "200k", "20m")}
    assert len(peaks) == 1


def test_a_plan_prints_and_serialises() -> None:
    made = plan(smollm2(), tokens="120k", budget="64MiB")
    fields = json.loads(json.dumps(made.to_dict()))
    assert fields["budget"] == "64MiB" and fields["tokens"] == 120_000 and fields["fits"] is True
    assert sum(fields["working_set"].values()) == fields["working_set_bytes"]
    for word in ("weights", "KV kept", "chunk", "prefill peak", "64.0 MiB", "120,000 tokens"):
        assert word in str(made)

"""Patterns against brute force: one full forward of the model under masks [H, T, T] written from the definitions."""

import importlib

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

import longfit
from longfit.attention import get, position
from longfit.attention.masked import attend_masked
from longfit.chunks import chunk_spans
from longfit.errors import InputError, UnsupportedModelError
from tests.tiny import tiny_model

PREFILL, DECODED, CHUNK = 45, 9, 12
T = PREFILL + DECODED
QUERY, KEY = torch.arange(T)[:, None], torch.arange(T)[None]
DISTANCE = QUERY - KEY
GLOBAL_ID = 7
CASES = {
    "sliding_window": ("sliding_window", {"window_tokens": 11, "sink_tokens": 3}),
    "lm_infinite": ("lm_infinite", {"window_tokens": 11, "global_tokens": 3, "distance_limit": 15}),
    "lm_infinite_middle": (
        "lm_infinite",
        {"window_tokens": 5, "global_tokens": 2, "middle_tokens": 3, "middle_from_layer": 1},
    ),
    "longformer": ("longformer", {"window_tokens": 9, "global_positions": (0, 1, 20, 50), "global_ids": (GLOBAL_ID,)}),
    "longformer_scored": ("longformer", {"window_tokens": 7, "global_positions": (0, 2), "scored_tokens": 4}),
    "etc": ("etc", {"window_tokens": 9, "segment_tokens": 14}),
    "longnet": ("longnet", {"segment_tokens": 6, "growth": 2, "branches": 3, "sink_tokens": 2}),
    "longnet_by_three": ("longnet", {"segment_tokens": 4, "growth": 3, "branches": 2, "sink_tokens": 0}),
    "zebra": ("zebra", {"window_tokens": 11, "sink_tokens": 2, "global_every": 2}),
    "swan": ("swan", {"window_tokens": 11, "sink_tokens": 2, "global_every": 2, "trained_tokens": 30}),
}
FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt_neox"]


class Brute:
    """Attention of a whole input, from the definition of a pattern."""

    def __init__(self, model, case: str, ids: torch.Tensor) -> None:
        self.name, self.options = CASES[case]
        self.model, self.ids, self.config = model, ids, model.config

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        layer, group = module.layer_idx, query.shape[1] // key.shape[1]
        wide_key, wide_value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        logits = (query @ wide_key.mT).float() * scaling
        if getattr(module, "sliding_window", None):
            counts = (DISTANCE >= 0) & (module.sliding_window > DISTANCE)
        elif self.name in ("zebra", "swan") and layer % self.options["global_every"] == 0:
            counts = DISTANCE >= 0
            if self.name == "swan":
                logits = self.without_distance(query, wide_key, 0) * scaling * self.sharpness()
        elif self.name == "lm_infinite":
            logits, counts = self.limited(query, wide_key, scaling, layer)
        elif self.options.get("scored_tokens"):
            counts = self.scored(logits, group)
        else:
            counts = self.counts(query.shape[1])
        logits = logits + counts.float().log()
        return (logits.softmax(-1).to(value.dtype) @ wide_value).transpose(1, 2), None

    def counts(self, H: int) -> torch.Tensor:
        """How often each query sees each key, [H, T, T] or [T, T]."""
        o = self.options
        if self.name == "longnet":
            seen = torch.zeros(H, T, T, dtype=torch.long)
            for h in range(H):
                for k in range(o["branches"]):
                    dilation = o["growth"] ** k
                    size = o["segment_tokens"] * dilation
                    chosen = torch.arange(T) % dilation == h % dilation
                    seen[h] += (QUERY // size == KEY // size) & chosen[:, None] & chosen[None] & (DISTANCE >= 0)
            return seen + ((o["sink_tokens"] > KEY) & (o["segment_tokens"] <= QUERY))
        window = (DISTANCE >= 0) & (o["window_tokens"] > DISTANCE)
        if self.name in ("longformer", "etc"):
            everywhere = torch.zeros(T, dtype=torch.bool)
            for place in range(T):
                if self.name == "etc":
                    everywhere[place] = place % o["segment_tokens"] == 0
                else:
                    by_id = int(self.ids[0, place]) in o.get("global_ids", ())
                    everywhere[place] = place in o["global_positions"] or by_id
            return window | ((everywhere[:, None] | everywhere[None]) & (DISTANCE >= 0))
        return window | ((o["sink_tokens"] > KEY) & (DISTANCE >= 0))

    def without_distance(self, query, key, place: int) -> torch.Tensor:
        """Dot products as if every query stood at `place` and every key at 0."""
        return (self.turned(self.turned(query, -1), 1, place) @ self.turned(key, -1).mT).float()

    def turned(self, vectors, direction: int, place: int | None = None) -> torch.Tensor:
        """Vectors rotated forward or backward by their own positions, or by `place`."""
        decoder = self.model.get_decoder()
        modeling = importlib.import_module(type(decoder).__module__)
        places = torch.arange(T)[None] if place is None else torch.full((1, T), place)
        per_layer = ["full_attention"] if self.config.model_type == "gemma3_text" else []
        cos, sin = decoder.rotary_emb(torch.zeros(1), places, *per_layer)
        return modeling.apply_rotary_pos_emb(vectors, vectors, cos, direction * sin)[0]

    def sharpness(self) -> torch.Tensor:
        trained = torch.tensor(float(self.options["trained_tokens"]))
        return (torch.log(torch.arange(T) + 1.0) / trained.log()).clamp(min=1.0)[:, None]

    def limited(self, query, key, scaling, layer: int):
        o = self.options
        first, window, limit = o["global_tokens"], o["window_tokens"], o.get("distance_limit", o["window_tokens"])
        logits = (query @ key.mT).float() * scaling
        at_limit = self.without_distance(query, key, limit) * scaling
        logits = torch.where((first > KEY) & (limit < DISTANCE), at_limit, logits)
        counts = ((first > KEY) | (window > DISTANCE)) & (DISTANCE >= 0)
        if not o.get("middle_tokens") or layer < o["middle_from_layer"]:
            return logits, counts
        middle = (first <= KEY) & (window <= DISTANCE)
        best = at_limit.masked_fill(~middle, float("-inf")).topk(o["middle_tokens"], -1).indices
        brought = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True) & middle
        return torch.where(brought, at_limit, logits), counts | brought

    def scored(self, logits, group: int) -> torch.Tensor:
        """Chunk by chunk, as the tokens with most attention received turn global; [1, H, T, T]."""
        o, H = self.options, logits.shape[1]
        base = self.counts(H).expand(1, H, T, T).clone()
        window = (DISTANCE >= 0) & (o["window_tokens"] > DISTANCE)
        mass = torch.full((H // group, T), float("-inf"))
        for start, stop in chunk_spans(PREFILL, CHUNK):
            weights = logits.masked_fill(~base, float("-inf")).softmax(-1)
            for g in range(H // group):
                for j in range(start, stop):
                    if j not in o["global_positions"]:
                        asking = slice(start, stop)
                        own = weights[0, g * group : (g + 1) * group, asking, j] * window[asking, j]
                        mass[g, j] = own.sum()
                best = mass[g].topk(o["scored_tokens"]).indices
                mass[g] = torch.full((T,), float("-inf")).scatter(0, best, mass[g, best])
                later = (stop <= QUERY) & torch.isin(KEY, best[mass[g, best] > float("-inf")])
                heads = slice(g * group, (g + 1) * group)
                base[:, heads, stop:] = (self.counts(H) | later)[stop:]
        return base


def run_brute(model, case: str, ids: torch.Tensor) -> torch.Tensor:
    AttentionInterface.register("test_patterns", Brute(model, case, ids))
    AttentionMaskInterface.register("test_patterns", lambda **kwargs: None)
    model.set_attn_implementation("test_patterns")
    return model(ids, use_cache=False).logits


def run_stream(model, patch, ids: torch.Tensor, **how) -> torch.Tensor:
    """Logits of a prefill in chunks and of single decoded tokens."""
    fitted = longfit.wrap(model, attention=patch, chunk_tokens=CHUNK, **how)
    outputs = fitted(ids[:, :PREFILL], use_cache=True)
    logits = [outputs.logits]
    for t in range(PREFILL, T):
        outputs = fitted(ids[:, t : t + 1], past_key_values=outputs.past_key_values, use_cache=True)
        logits.append(outputs.logits)
    longfit.unwrap(model)
    return torch.cat(logits, 1)


def some_ids() -> torch.Tensor:
    ids = torch.randint(8, 100, (1, T), generator=torch.Generator().manual_seed(3))
    ids[0, [13, 33, 48]] = GLOBAL_ID
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_streaming_is_full_attention_under_the_mask(case: str, family: str) -> None:
    model, ids = tiny_model(family), some_ids()
    name, options = CASES[case]
    given = run_stream(model, get(name, **options), ids)
    assert torch.allclose(given, run_brute(model, case, ids), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("case", sorted(set(CASES) - {"lm_infinite_middle", "longformer_scored"}))
def test_in_low_precision(case: str) -> None:
    """The cases without a choice by score, where a rounding cannot turn into another choice."""
    model, ids = tiny_model("llama", torch.bfloat16), some_ids()
    name, options = CASES[case]
    given = run_stream(model, get(name, **options), ids).float()
    expected = run_brute(model, case, ids).float()
    assert (given - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    "patch",
    [
        get("lm_infinite", window_tokens=5, global_tokens=2, middle_tokens=3, middle_from_layer=0),
        get("swan", window_tokens=11, global_every=1, trained_tokens=30),
    ],
    ids=["lm_infinite", "swan"],
)
def test_packed_positions_change_nothing_where_all_is_stored(patch) -> None:
    """Packed keys rest at other rotary positions than the input's; what is taken out of them has to be those."""
    model, ids = tiny_model("llama"), some_ids()
    expected = run_stream(model, patch, ids, geometry="original")
    assert torch.allclose(run_stream(model, patch, ids, geometry="packed"), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["lm_infinite", "swan"])
def test_past_the_window_positions_stay_the_inputs_own(name: str) -> None:
    model = longfit.wrap(tiny_model("llama", max_position_embeddings=32), attention=name, chunk_tokens=CHUNK)
    model.generate(some_ids(), max_new_tokens=3, do_sample=False)
    assert model.fit_report.geometry == "original"


def test_the_window_of_lm_infinite_is_the_models() -> None:
    fitted = longfit.wrap(tiny_model("llama", max_position_embeddings=32), attention="lm_infinite")
    assert fitted.longfit.patch.window == fitted.longfit.patch.limit == 32
    fitted.generate(some_ids(), max_new_tokens=3, do_sample=False)
    assert fitted.fit_report.kept_tokens <= fitted.longfit.patch.most_kept(0, 2)


def test_decoding_reads_what_is_in_sight() -> None:
    model, ids = tiny_model("llama"), some_ids()
    entry = 2 * 2 * 8 * 4 * model.config.num_hidden_layers  # keys and values, heads, head size, fp32, layers
    for name, options, entries in [
        ("sliding_window", {"window_tokens": 11, "sink_tokens": 3}, 13),
        ("lm_infinite", {"window_tokens": 11, "global_tokens": 3, "distance_limit": 15}, 13),
        ("longformer", {"window_tokens": 11, "global_positions": (0, 1, 2)}, 13),
    ]:
        fitted = longfit.wrap(model, attention=get(name, **options), chunk_tokens=CHUNK)
        fitted.generate(ids, max_new_tokens=5, do_sample=False)
        assert fitted.fit_report.read_bytes == 4 * entries * entry


@pytest.mark.parametrize("name", ["sliding_window", "lm_infinite", "longformer"])
def test_prefill_computes_the_window_not_the_input(name: str, monkeypatch) -> None:
    """Products of queries and keys grow with the window and a block's size, however long input and chunk are."""
    computed: list[int] = []

    def counted(queries, keys, *rest):
        computed.append(keys.shape[2])
        return attend_masked(queries, keys, *rest)

    monkeypatch.setattr(position, "attend_masked", counted)
    window = 40
    model = tiny_model("llama", max_position_embeddings=4096)
    fitted = longfit.wrap(model, attention=get(name, window_tokens=window), chunk_tokens=2000)
    fitted.compress(torch.randint(8, 100, (1, 3000), generator=torch.Generator().manual_seed(3)))
    assert max(computed) <= window + get(name).block_tokens + 10
    assert fitted.fit_report.kept_tokens <= (window + 10) * 64 / 63 + 2


@pytest.mark.parametrize("name", ["lm_infinite", "longformer", "etc", "zebra", "swan", "sliding_window"])
def test_a_window_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="window_tokens has to be at least 1"):
        get(name, window_tokens=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lm_infinite", {"window_tokens": 20, "distance_limit": 10}, "distance_limit=10 is smaller"),
        ("longnet", {"segment_tokens": 0}, "segment_tokens"),
        ("longnet", {"growth": 1}, "growth"),
        ("longnet", {"segment_tokens": 3, "sink_tokens": 4}, "more than the smallest segment"),
        ("etc", {"segment_tokens": 0}, "segment_tokens"),
        ("longformer", {"global_positions": (-1,)}, "whole numbers"),
        ("longformer", {"global_ids": "ab"}, "whole numbers"),
        ("swan", {"trained_tokens": 1}, "trained_tokens"),
    ],
)
def test_options_that_cannot_be_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        get(name, **options)


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES.values()}))
def test_models_whose_layers_all_slide_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="full-attention"):
        longfit.wrap(tiny_model("mistral", sliding_window=8), attention=name)


def test_layers_that_are_all_global_leave_zebra_nothing() -> None:
    with pytest.raises(UnsupportedModelError, match="stands in at"):
        longfit.wrap(tiny_model("llama"), attention="zebra", global_every=1)


def test_layers_without_rotary_positions_are_refused_where_keys_are_moved() -> None:
    for name in ("lm_infinite", "swan"):
        model = tiny_model("llama")
        model.config.no_rope_layers = [1, 0]
        with pytest.raises(UnsupportedModelError, match="without rotary"):
            longfit.wrap(model, attention=name)


def test_global_ids_need_ids() -> None:
    fitted = longfit.wrap(tiny_model("llama"), attention="longformer", global_ids=[GLOBAL_ID])
    with pytest.raises(InputError, match="embeddings"):
        fitted(inputs_embeds=fitted.get_input_embeddings()(some_ids()), use_cache=True)

"""ADORE: what is rebuilt is what the base model computes, the limit holds, and what decides can be exchanged."""

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

import longfit
from longfit.attention import Adore, Scene, get
from longfit.attention.controller import Controller, ShortKeys
from longfit.cache import Part
from longfit.errors import FingerprintError, InputError, ScoreError, UnsupportedFeatureError
from tests.patches import narrow
from tests.test_attention import generated, prompt
from tests.tiny import tiny_model

KEPT, REBUILT, SINKS, RECENT, ASKING = 20, 4, 2, 5, 3
SIZES = {
    "kept_tokens": KEPT,
    "rebuilt_tokens": REBUILT,
    "sink_tokens": SINKS,
    "recent_tokens": RECENT,
    "asking_tokens": ASKING,
}
ALL_BACK = {**SIZES, "rebuilt_tokens": 500}


class Dice(Controller):
    """Importance by lot: another one for every number of tokens."""

    def observe(self, scene, state) -> None:
        pass

    def importance(self, states, tokens: int) -> Tensor:
        return torch.rand(tokens, generator=torch.Generator().manual_seed(tokens))


class Reference:
    """The base model over everything that was ever forwarded, masked to what is kept: no cache of ours, no merging."""

    def __init__(self, model, kept: int) -> None:
        self.model, self.kept, self.cache = model, kept, DynamicCache(config=model.config)
        self.ids: list[int] = []  # of the tokens seen
        self.places: list[int] = []  # position of everything forwarded, in the order of the cache
        self.live: list[int] = []  # what of it is kept

    def forward(self, ids: list[int]) -> Tensor:
        """Logits [V] behind the new tokens; a single one has released tokens forwarded before it."""
        again = self.recalled() if len(ids) == 1 else []
        first, self.ids = len(self.ids), self.ids + ids
        new = again + list(range(first, len(self.ids)))
        old = len(self.places)
        self.places += new
        events = self.live + list(range(old, len(self.places)))
        mask = torch.full((len(new), len(self.places)), float("-inf"))
        for row, place in enumerate(new):
            mask[row, [event for event in events if self.places[event] <= place]] = 0.0
        logits = self.model(
            torch.tensor([[self.ids[place] for place in new]]),
            attention_mask=mask[None, None],
            position_ids=torch.tensor([new]),
            past_key_values=self.cache,
        ).logits[0, -1]
        self.live = sorted(events, key=lambda event: self.places[event])
        if len(self.live) > self.kept:
            self.release()
        return logits

    def importance(self) -> list[float]:
        return Dice().importance([], len(self.ids)).tolist()

    def recalled(self) -> list[int]:
        here, importance = {self.places[event] for event in self.live}, self.importance()
        released = [place for place in range(len(self.ids)) if place not in here]
        return sorted(sorted(released, key=lambda place: -importance[place])[:REBUILT])

    def release(self) -> None:
        seen, importance = len(self.ids), self.importance()

        def rank(event: int) -> float:
            place = self.places[event]
            return float("inf") if place < SINKS or place >= seen - RECENT else importance[place]

        best = sorted(self.live, key=lambda event: -rank(event))[: self.kept]
        self.live = sorted(best, key=lambda event: self.places[event])


@pytest.mark.parametrize("family", ["llama", "llama_mqa", "llama_yarn", "qwen3", "phi3", "gpt_neox"])
def test_rebuilt_tokens_are_what_the_base_model_computes(family: str) -> None:
    model, ids = tiny_model(family, attention="eager"), prompt(1, 62)[0].tolist()
    reference, expected, keys, values = Reference(model, KEPT), [], [], []
    for start, stop in ((0, 2), (2, 18), (18, 34), (34, 47), *((at, at + 1) for at in range(47, 62))):
        expected.append(reference.forward(ids[start:stop]))
    for layer in reference.cache.layers:
        keys.append(layer.keys[:, :, reference.live])
        values.append(layer.values[:, :, reference.live])

    fitted = longfit.wrap(model, attention=get("adore", **SIZES, controller=Dice()), chunk_tokens=16)
    outputs = fitted(torch.tensor([ids[:50]]), use_cache=True, logits_to_keep=1)
    given, cache, again = [outputs.logits[0, -1]], outputs.past_key_values, []
    for at in range(50, 62):
        outputs = fitted(torch.tensor([ids[at : at + 1]]), past_key_values=cache)
        assert outputs.logits.shape[1] == 1
        given.append(outputs.logits[0, -1])
        again += cache.step.again
    for ours, theirs in zip(given, expected[6:], strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.std()
    for layer, theirs, others in zip(cache.bounded, keys, values, strict=True):
        store = layer.parts[0].store
        assert store.positions[0, 0].tolist() == [reference.places[event] for event in reference.live]
        assert torch.allclose(store.keys, theirs, atol=1e-4)
        assert torch.allclose(store.values, others, atol=1e-4)
    assert all(len(row) == REBUILT for row in again)
    assert cache.rebuilt_tokens == 15 * REBUILT
    assert len({tuple(row) for row in again}) > 6


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_where_all_that_was_released_is_rebuilt_it_is_full_attention(family: str) -> None:
    """Read in one chunk, what is kept saw everything; forwarded again all together, so do the others."""
    model, ids = tiny_model(family), prompt(2, 60)
    expected = generated(model, ids)
    fitted = longfit.wrap(model, attention="adore", chunk_tokens=64, **ALL_BACK)
    given = generated(fitted, ids)
    assert torch.equal(given.sequences, expected.sequences)
    for ours, theirs in zip(given.logits, expected.logits, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.std()
    report = fitted.fit_report
    assert report.kept_tokens == KEPT
    assert report.rebuilt_tokens == 2 * sum(seen - KEPT for seen in range(57, 68))
    assert f"{report.rebuilt_tokens:,} tokens forwarded again" in str(report)


def test_rows_that_need_more_and_fewer_tokens_again_run_together() -> None:
    model, ids = tiny_model("llama"), prompt(3, 60)
    mask = torch.ones_like(ids)
    mask[1, :17], mask[2, :59] = 0, 0  # 37 tokens to rebuild at first, 20, and none
    how = {"attention_mask": mask, "max_new_tokens": 12}
    expected = generated(model, ids, **how).sequences
    fitted = longfit.wrap(model, attention="adore", chunk_tokens=64, **ALL_BACK)
    assert torch.equal(generated(fitted, ids, **how).sequences, expected)


def test_beams_over_rebuilt_tokens_are_the_models_own() -> None:
    model, ids = tiny_model("llama"), prompt(2, 50)
    how = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    expected = model.generate(ids, **how)
    fitted = longfit.wrap(model, attention="adore", chunk_tokens=64, **ALL_BACK)
    assert torch.equal(fitted.generate(ids, **how), expected)


def test_every_logit_asked_for_is_a_new_tokens() -> None:
    model, ids = tiny_model("llama"), prompt(1, 60)
    expected = model(ids, use_cache=False).logits
    fitted = longfit.wrap(model, attention="adore", chunk_tokens=64, **ALL_BACK)
    given = fitted(ids, use_cache=True).logits
    assert given.shape == expected.shape
    assert torch.allclose(given, expected, atol=1e-3)


# -- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["56 tokens", "10%", "1 MiB", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_limit_holds_at_every_step_in_every_layer(budget: str | None, dtype: torch.dtype) -> None:
    patch = get("adore", **SIZES | {"kept_tokens": 64})
    fitted = longfit.wrap(tiny_model("llama", dtype), attention=patch, budget=budget, chunk_tokens=32)
    ids, cache = prompt(1, 420), None
    entry = 2 * (2 * 8 * dtype.itemsize + 4)  # of both heads
    controller = 2 * (2 * (8 + 4) + 4)
    for step in range(12):
        tokens = ids[:, :400] if step == 0 else ids[:, 400 + step : 401 + step]
        cache = fitted(tokens, past_key_values=cache, use_cache=True).past_key_values
        limit = {"56 tokens": 56, "10%": (400 + step) // 10}.get(budget, 64)
        held = [part.kept for layer in cache.bounded for part in layer.parts]
        assert len(set(held)) == 1
        assert limit - 1 <= held[0] <= limit
        kept = [layer.parts[0].store.positions[0, 0].tolist() for layer in cache.bounded]
        assert kept[0] == kept[1] == sorted(set(kept[0]))
        assert cache.nbytes <= 2 * limit * entry + (400 + 400 // 8 + 256) * (4 + controller)
    assert fitted.longfit.report.kv_bytes <= 2**20


def test_the_plan_sets_aside_what_all_tokens_cost() -> None:
    patch = get("adore", sink_tokens=2, recent_tokens=5, rebuilt_tokens=4)
    fitted = longfit.wrap(tiny_model("llama"), attention=patch, budget="256KiB", chunk_tokens=32)
    limits = []
    for tokens in (200, 400):
        generated(fitted, prompt(1, tokens), max_new_tokens=2)
        report = fitted.fit_report
        assert report.kv_bytes <= 256 * 1024
        limits.append(report.limit_tokens)
    assert limits[1] < limits[0] - 15


def test_in_the_smallest_budgets_sinks_and_the_newest_stay() -> None:
    fitted = longfit.wrap(tiny_model("llama"), attention=narrow("adore"), budget="6 tokens", chunk_tokens=16)
    cache = fitted.compress(prompt()).cache
    assert cache.bounded[1].parts[0].store.positions[0, 0].tolist() == [0, 1, 56, 57, 58, 59]


def test_released_for_good_where_nothing_is_rebuilt() -> None:
    fitted = longfit.wrap(tiny_model("llama"), attention=get("adore", **SIZES | {"rebuilt_tokens": 0}))
    generated(fitted, prompt())
    assert fitted.fit_report.rebuilt_tokens == 0
    assert fitted.fit_report.kept_tokens == KEPT


def test_a_memory_does_not_change_by_asking() -> None:
    fitted = longfit.wrap(tiny_model("llama"), attention=narrow("adore"), chunk_tokens=16)
    memory = fitted.compress(prompt(1, 60))
    before = [{name: t.clone() for name, t in layer.parts[0].state.items()} for layer in memory.cache.bounded]
    generated(fitted, prompt(1, 7), memory=memory)
    for layer, state in zip(memory.cache.bounded, before, strict=True):
        assert layer.parts[0].state.keys() == state.keys()
        assert all(torch.equal(layer.parts[0].state[name], t) for name, t in state.items())


def test_a_memory_is_saved_with_ids_and_short_keys(tmp_path) -> None:
    fitted = longfit.wrap(tiny_model("llama"), attention=narrow("adore"), chunk_tokens=16)
    memory = fitted.compress(prompt(1, 60))
    memory.save(tmp_path / "memory")
    again = longfit.Memory.load(tmp_path / "memory", fitted)
    given = [generated(fitted, prompt(1, 7), memory=each).sequences for each in (memory, again)]
    assert torch.equal(*given)
    assert fitted.fit_report.rebuilt_tokens > 0


# -- what decides --------------------------------------------------------------------------------------------------


def test_short_keys_estimate_the_attention_of_the_last_queries() -> None:
    H, G, D, n, asking, decay = 4, 2, 16, 40, 5, 0.8
    controller = ShortKeys(watched_layers=1, query_tokens=asking, pool_tokens=1, decay=decay)
    queries, keys = torch.randn(1, H, n, D), torch.randn(1, G, n, D)
    part, expected = Part(slice(0, 1), slice(0, G), 0), torch.zeros(0)
    for start, stop in ((0, 17), (17, 39), (39, 40)):
        scene = Scene(
            queries=queries[:, :, start:stop],
            keys=keys[:, :, start:stop],
            values=keys[:, :, start:stop],
            stored_keys=None,
            stored_values=None,
            part=part,
            first=start,
            first_rotary=start,
            scaling=0.3,
            backend="sdpa",
            phase="prefill",
            layer=0,
            layers=1,
        )
        controller.observe(scene, part.state)
        logits = queries[0, :, start:stop] @ keys[0, :, :stop].repeat_interleave(H // G, 0).mT * 0.3
        later = torch.arange(stop) > torch.arange(start, stop)[:, None]
        weights = logits.masked_fill(later, float("-inf")).softmax(-1).amax(0)
        aged = [
            weights[at] * decay ** (stop - start - 1 - at) for at in range(max(0, stop - start - asking), stop - start)
        ]
        before = torch.cat([expected * decay ** (stop - start), torch.zeros(stop - start)])
        expected = torch.stack([before, *aged]).amax(0)
    given = controller.importance([part.state], n)
    assert (given - expected).abs().max() < 0.02 * expected.max()


def test_watched_layers_are_spread_evenly() -> None:
    assert [layer for layer in range(30) if ShortKeys(watched_layers=4).watches(layer, 30)] == [3, 11, 18, 26]
    assert [layer for layer in range(2) if ShortKeys(watched_layers=4).watches(layer, 2)] == [0, 1]


class Recurrent(Controller):
    """The shape of the paper's controller: a GRU over the tokens' embeddings, with a head that says who is needed."""

    def __init__(self) -> None:
        self.gru, self.head = nn.GRUCell(48, 12), nn.Linear(12, 48)

    def bind(self, model) -> None:
        self.embed = model.get_input_embeddings()

    def learned(self) -> dict[str, Tensor]:
        return {**self.gru.state_dict(), **self.head.state_dict()}

    def observe(self, scene, state) -> None:
        if scene.layer == 0:
            embedded = self.embed(scene.ids[0])
            for one in embedded:
                state["hidden"] = self.gru(one[None], state.get("hidden"))
            state["embedded"] = torch.cat([state.get("embedded", embedded[None, :0]), embedded[None]], 1)

    def importance(self, states, tokens: int) -> Tensor:
        return (states[0]["embedded"] @ self.head(states[0]["hidden"])[0])[0, :tokens]


@torch.no_grad()
def test_a_trained_controller_can_be_put_in() -> None:
    controller = Recurrent()
    fitted = longfit.wrap(tiny_model("llama"), attention=Adore(**SIZES, controller=controller), chunk_tokens=16)
    ids = prompt(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    together = generated(fitted, ids * mask, attention_mask=mask).sequences
    assert fitted.fit_report.rebuilt_tokens > 0
    assert torch.equal(generated(fitted, ids[1:, 17:]).sequences[0, 43:], together[1, 60:])
    memory = fitted.compress(ids[:1])
    controller.head.weight.add_(0.1)
    with pytest.raises(FingerprintError):
        fitted.generate(ids[:1, :3], memory=memory, max_new_tokens=2)


class Broken(Dice):
    def importance(self, states, tokens: int) -> Tensor:
        return torch.full((tokens,), float("nan"))


def test_a_controller_that_says_nothing_usable_is_an_error() -> None:
    fitted = longfit.wrap(tiny_model("llama"), attention=Adore(**SIZES, controller=Broken()))
    with pytest.raises(ScoreError, match="60 of them NaN"):
        fitted.compress(prompt())


# -- what is refused -----------------------------------------------------------------------------------------------


def test_embeddings_have_no_ids() -> None:
    fitted = longfit.wrap(tiny_model("llama"), attention=narrow("adore"))
    with pytest.raises(UnsupportedFeatureError, match="embeddings"):
        fitted(inputs_embeds=torch.randn(1, 30, 48), use_cache=True)


def test_packed_positions_and_inputs_past_the_window_are_refused() -> None:
    model = tiny_model("llama", max_position_embeddings=64)
    for geometry, tokens in (("packed", 40), (None, 80)):
        fitted = longfit.wrap(model, attention=narrow("adore"), geometry=geometry)
        with pytest.raises(UnsupportedFeatureError, match="packed positions"):
            generated(fitted, prompt(1, tokens))


def test_options_are_checked() -> None:
    for options in ({"kept_tokens": 0}, {"recent_tokens": 0}, {"rebuilt_tokens": -1}, {"controller": "gru"}):
        with pytest.raises(InputError, match=next(iter(options))):
            get("adore", **options)
    for options in ({"watched_layers": 0}, {"pool_tokens": 4}, {"decay": 1.5}):
        with pytest.raises(InputError, match=next(iter(options))):
            ShortKeys(**options)

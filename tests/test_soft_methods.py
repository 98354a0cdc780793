"""What holds for every learned compressor.

The traps of learned compressors, and where each is tested:
    1 size of hidden states as embeddings: test_soft_summaries; 2 a memory changed by reading: here; 3 `generate` with
    a memory: test_learned_wrapper; 4 rotated keys: test_soft_store, here (positions); 5 two geometries: here; 6 first
    token after the memory: here, and trained: test_training_loss_values; 7 boundary, a raw window:
    test_learned_wrapper; 8 no new vocabulary: here; 9 masks and low precision: here, test_soft_layout,
    test_soft_precision; 10 bidirectional encoders: tests of those methods; 11 batches: here; 12 sinks: here; 13
    adapters off where they should be: here; 14 query-aware memories: test_memory_file; 15 slots counted honestly:
    here; 16 honest evaluation: tests of the evaluation; 17 saving quantised models: test_gguf_loading.
"""

import pytest
import torch
from torch.nn import functional as F

from longfit.cache import SLIDING
from longfit.compressors.soft import available
from longfit.errors import InputError, UnsupportedFeatureError
from tests.soft_models import FAMILIES, METHODS, bound, copy_weights, has_first, shared, tensors, words
from tests.tiny import tiny_model

every = pytest.mark.parametrize("case", METHODS)
families = pytest.mark.parametrize("family", FAMILIES)


def full_layers(compressor, encoded):
    """Entries of the layers where memory stays."""
    kinds = compressor.backbone.types
    return [e for kind, e in zip(kinds, encoded.layers or (), strict=False) if kind != SLIDING]


def unused(compressor, name: str) -> bool:
    """Weights that write the last layer's output, where only its keys and values are kept and nobody reads it."""
    last = len(compressor.backbone.layers) - 1
    wrote = (f"layers.{last}." in name and ".encoder." in name) or f"copies.{last}_" in name
    kept = any(part in name for part in ("k_proj", "v_proj", "qkv_proj", "query_key_value"))
    return compressor.memory == "kv" and not compressor.shared_adapter and wrote and not kept


@every
@pytest.mark.parametrize("tokens", [1, 2, 3, 9, 10, 20, 27])
@torch.no_grad()
def test_slots_are_counted_as_they_are(case, tokens):
    compressor = shared(case, "llama")
    encoded = compressor.compress(words(1, tokens))
    assert encoded.slots == compressor.slots_for(tokens)
    assert encoded.tokens_in == tokens
    if encoded.layers is not None:
        assert encoded.layers[0].keys.shape[2] == encoded.slots
    if encoded.soft is not None:
        assert encoded.soft.shape[1] == encoded.slots


@every
@families
class TestMemory:
    @torch.no_grad()
    def test_in_one_go_is_segment_by_segment(self, case, family):
        compressor, ids = shared(case, family), words(2, 25)
        whole = compressor.compress(ids)
        parts = compressor.compress(ids[:, 18:], compressor.compress(ids[:, 9:18], compressor.compress(ids[:, :9])))
        assert (whole.tokens_in, whole.next_position) == (parts.tokens_in, parts.next_position)
        for a, b in zip(tensors(whole), tensors(parts), strict=True):
            assert torch.equal(a, b)

    @torch.no_grad()
    def test_reading_is_repeatable_and_leaves_the_memory_alone(self, case, family):
        compressor, ids = shared(case, family), words(2, 20)
        encoded = compressor.compress(ids)
        before = [t.clone() for t in tensors(encoded)]
        first = compressor.read(encoded, words(2, 6, 1))
        compressor.read(encoded, words(2, 4, 2))
        assert torch.equal(compressor.read(encoded, words(2, 6, 1)), first)
        assert all(torch.equal(a, b) for a, b in zip(tensors(encoded), before, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(tensors(compressor.compress(ids)), before, strict=True))

    @torch.no_grad()
    def test_a_batch_is_its_rows(self, case, family):
        compressor, ids, asked = shared(case, family), words(3, 20), words(3, 5, 1)
        encoded = compressor.compress(ids)
        together = compressor.read(encoded, asked)
        for row in range(3):
            alone = compressor.compress(ids[row : row + 1])
            one = asked[row : row + 1]
            torch.testing.assert_close(compressor.read(alone, one)[0], together[row], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(compressor.read(encoded.row(row), one)[0], together[row], rtol=1e-3, atol=1e-3)
            assert encoded.row(row).sources.shape == (encoded.slots, 2)

    @torch.no_grad()
    def test_positions_and_sources(self, case, family):
        compressor = shared(case, family)
        encoded = compressor.compress(words(2, 20))
        sources = encoded.row(0).sources
        assert (sources[:, 0] < sources[:, 1]).all() and sources.min() == 0 and sources.max() == 20
        if compressor.packs and compressor.memory != "cross":
            assert encoded.next_position == encoded.slots
        elif compressor.memory == "kv":
            assert encoded.next_position == encoded.tokens_in
        for kind, entries in zip(compressor.backbone.types, encoded.layers or (), strict=False):
            positions = entries.positions
            assert (positions.diff() >= 0).all() and (positions < encoded.next_position).all()
            if kind == SLIDING:
                window = compressor.backbone.windows[compressor.backbone.types.index(kind)]
                assert positions.shape[-1] <= window - 1
                assert positions[-1] == encoded.next_position - 1
            elif compressor.packed:
                assert positions.tolist() == list(range(encoded.slots))

    @torch.no_grad()
    def test_the_reader_reads_it(self, case, family):
        compressor, asked = shared(case, family), words(1, 5, 1)
        one, other = (compressor.read(compressor.compress(words(1, 20, seed)), asked) for seed in (2, 3))
        assert one.shape == (1, 4, 101) and one.isfinite().all()
        assert (one - other).abs().max() > 1e-3

    @torch.no_grad()
    def test_later_text_does_not_reach_earlier_memory(self, case, family):
        compressor, ids = shared(case, family), words(1, 18)
        changed = torch.cat([ids[:, :9], words(1, 9, 5)], 1)
        if case == "autocompressor replacing":
            pytest.skip("earlier memory is replaced")
        one, other = compressor.compress(ids), compressor.compress(changed)
        M = compressor.slots_for(9)
        if one.soft is not None:
            assert torch.equal(one.soft[:, :M], other.soft[:, :M])
        for a, b in zip(full_layers(compressor, one), full_layers(compressor, other), strict=True):
            assert torch.equal(a.keys[:, :, :M], b.keys[:, :, :M])
            assert torch.equal(a.values[:, :, :M], b.values[:, :, :M])

    @torch.no_grad()
    def test_the_sink_stays_raw(self, case, family):
        compressor, ids = bound(case, family), words(1, 20)
        if not compressor.sink_tokens:
            pytest.skip("it keeps no sinks")
        encoded, backbone = compressor.compress(ids), compressor.backbone
        if encoded.soft is not None:
            assert torch.equal(encoded.soft[:, :1], backbone.embed(ids[:, :1]))
        plain = backbone.run(backbone.embed(ids[:, :1]), torch.arange(1))
        for kind, base, kept in zip(backbone.types, plain.entries, encoded.layers or (), strict=False):
            if kind != SLIDING:
                torch.testing.assert_close(kept.keys[:, :, :1], base.keys, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(kept.values[:, :, :1], base.values, rtol=1e-4, atol=1e-5)

    def test_gradients_reach_all_that_trains_and_nothing_else(self, case, family):
        compressor, ids, asked = bound(case, family, trained=True), words(2, 25), words(2, 6, 1)
        if hasattr(compressor, "detach_every"):
            compressor.detach_every = 0
        own = {id(p) for group in compressor.parameters().values() for p in group}
        if not own:
            pytest.skip("nothing trains")
        for parameter in compressor.backbone.model.parameters():
            parameter.requires_grad_(id(parameter) in own)
        encoded = compressor.compress(ids)
        first = 0 if has_first(compressor) else 1
        loss = sum(compressor.auxiliary(encoded, ids, compressor.ratio).values())
        for cue in compressor.cues or [None]:
            logits = compressor.read(encoded, asked, first=first, cue=cue)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), asked[:, first:].flatten())
        loss.backward()
        named = [*compressor.backbone.model.named_parameters(), *compressor.modules.named_parameters()]
        for name, parameter in named:
            if id(parameter) in own and not unused(compressor, name):
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
                assert parameter.grad.abs().sum() > 0, name
        others = [p for p in compressor.backbone.model.parameters() if id(p) not in own]
        assert all(p.grad is None for p in others)

    @torch.no_grad()
    def test_outside_the_base_is_what_it_was(self, case, family):
        plain = tiny_model(family)
        ids, names = words(1, 12), list(plain.state_dict())
        before = plain(ids).logits
        compressor = bound(case, family, trained=True)
        model = compressor.backbone.model
        assert torch.equal(model(ids).logits, before)
        compressor.read(compressor.compress(ids), words(1, 4))
        assert torch.equal(model(ids).logits, before)
        assert model.get_input_embeddings().weight.shape == plain.get_input_embeddings().weight.shape
        assert model.get_output_embeddings().weight.shape == plain.get_output_embeddings().weight.shape
        compressor.release()
        assert torch.equal(model(ids).logits, before)
        assert list(model.state_dict()) == names
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        for key, value in plain.state_dict().items():
            assert torch.equal(model.state_dict()[key], value)


@every
class TestReading:
    def test_the_first_token_is_predicted_where_something_stands_before_it(self, case):
        compressor, asked = shared(case, "llama"), words(1, 5, 1)
        encoded = compressor.compress(words(1, 20))
        for cue in compressor.cues:
            assert compressor.read(encoded, asked, first=0, cue=cue).shape == (1, 5, 101)
        if compressor.memory == "soft":
            assert compressor.read(encoded, asked, first=0).shape == (1, 5, 101)
            torch.testing.assert_close(compressor.read(encoded, asked, first=0)[:, 1:], compressor.read(encoded, asked))
        elif compressor.memory == "kv":
            with pytest.raises(InputError, match="nothing stands before"):
                compressor.read(encoded, asked, first=0)
        with pytest.raises(InputError, match="has no cue 'sing'"):
            compressor.read(encoded, asked, cue="sing")

    @torch.no_grad()
    def test_bf16(self, case):
        compressor = bound(case, "llama", torch.bfloat16, trained=True)
        encoded = compressor.compress(words(2, 20))
        logits = compressor.read(encoded, words(2, 5, 1))
        assert logits.isfinite().all() and logits.dtype == torch.bfloat16
        exact = bound(case, "llama", trained=True)
        wanted = exact.read(exact.compress(words(2, 20)), words(2, 5, 1))
        if case != "nugget":  # rounding may choose another token
            assert (logits - wanted).float().std() < 0.2 * wanted.std()

    @torch.no_grad()
    def test_eager_attention_agrees_with_sdpa(self, case):
        one = shared(case, "gemma3_text")
        eager = type(one)(**one.options()).bind(tiny_model("gemma3_text", attention="eager"))
        copy_weights(one, eager)
        ids, asked = words(1, 20), words(1, 5, 1)
        results = [compressor.read(compressor.compress(ids), asked) for compressor in (one, eager)]
        torch.testing.assert_close(*results, rtol=5e-3, atol=5e-3)

    def test_a_few_steps_lower_the_loss_and_leave_the_base_alone(self, case):
        compressor, ids, asked = bound(case, "llama"), words(2, 20), words(2, 6, 1)
        model, plain = compressor.backbone.model, tiny_model("llama")
        own = [p for group in compressor.parameters().values() for p in group]
        if not own:
            pytest.skip("nothing trains")
        model.requires_grad_(False)
        optimiser, losses = torch.optim.Adam([p.requires_grad_() for p in own], lr=0.01), []
        for _ in range(6):
            logits = compressor.read(compressor.compress(ids), asked)
            loss = F.cross_entropy(logits.flatten(0, 1), asked[:, 1:].flatten())
            losses.append(float(loss))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert losses[-1] < losses[0]
        compressor.release()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))

    @torch.no_grad()
    def test_a_higher_ratio_gives_fewer_slots(self, case):
        compressor = shared(case, "llama")
        encoded = compressor.compress(words(1, 27), ratio=6)
        assert encoded.slots == compressor.slots_for(27, 6) < compressor.slots_for(27)


def test_attention_that_takes_no_masks_is_refused():
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedFeatureError, match="sdpa"):
        available()["gist"](adapter="untrained").bind(model)

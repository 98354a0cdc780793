"""CEPE: cross-attention against a loop, its place in the layer, zero gates, and that nothing stays behind."""

import pytest
import torch

from longfit.compressors.soft import available
from longfit.compressors.soft.cross import CrossAttention
from longfit.compressors.soft.encoded import Encoded
from longfit.errors import InputError
from tests.encoders import FAMILIES, bound, gradients, logits_of, reading_loss, token_ids
from tests.tiny import tiny_model


def cepe(family="llama", dtype=torch.float32, **options):
    return bound("cepe", tiny_model(family, dtype), **{"encoder_layers": 1, **options})


def hooks(model):
    return [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]


def base_logits(method, ids):
    with method.lora.using(None):
        return method.backbone.model(ids).logits[:, :-1]


@torch.no_grad()
def test_cross_attention_equals_a_loop():
    cross = CrossAttention(12, 8, heads=4, groups=2, head_dim=3)
    hidden, memory = torch.randn(2, 3, 12), torch.randn(2, 5, 8)
    out = cross(hidden, *cross.project(memory))
    for b in range(2):
        for t in range(3):
            query = cross.query(hidden[b, t] / (hidden[b, t].square().mean() + 1.2e-7).sqrt()).view(4, 3)
            heads = []
            for h in range(4):
                keys = torch.stack([cross.key(m).view(2, 3)[h // 2] for m in memory[b]])
                values = torch.stack([cross.value(m).view(2, 3)[h // 2] for m in memory[b]])
                heads.append((keys @ query[h] / 3**0.5).softmax(0) @ values)
            torch.testing.assert_close(out[b, t], cross.out(torch.cat(heads)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_at_the_start_reading_is_the_base_without_context_bit_for_bit(family, dtype):
    method = cepe(family, dtype, awake=False)
    ids = token_ids()
    encoded = method.compress(token_ids(seed=4))
    assert torch.equal(method.read(encoded, ids), method.read(Encoded(0, encoded.sources[:0], 0), ids))
    torch.testing.assert_close(method.read(encoded, ids), base_logits(method, ids), atol=1e-4, rtol=2e-2)


@torch.no_grad()
def test_the_memory_joins_between_self_attention_and_feed_forward():
    method = cepe()
    model, ids, encoded = method.backbone.model, token_ids(), method.compress(token_ids(seed=4))
    hidden, T = model.get_input_embeddings()(ids), ids.shape[1]
    tables = model.model.rotary_emb(hidden, torch.arange(T)[None])
    causal = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    for layer, cross in zip(model.model.layers, method.modules["cross"], strict=True):
        hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), tables, causal)[0]
        hidden = hidden + cross(hidden, *cross.project(encoded.states))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    expected = model.lm_head(model.model.norm(hidden))[:, :-1]
    torch.testing.assert_close(method.read(encoded, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_reads_its_memory_and_every_part_of_it(family):
    method = cepe(family)
    ids = token_ids()
    context = token_ids(seed=4)
    other = context.clone()
    other[:, 0] += 1
    ours, theirs = method.read(method.compress(context), ids), method.read(method.compress(other), ids)
    assert not torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, base_logits(method, ids), atol=1e-3)
    assert torch.equal(ours, method.read(method.compress(context), ids))


@torch.no_grad()
def test_chunks_are_read_alone_and_both_ways():
    method = cepe(segment_tokens=6)
    ids = token_ids(tokens=15)
    encoded = method.compress(ids)
    assert encoded.slots == method.slots_for(15) == 15
    assert encoded.sources.tolist() == [[i, i + 1] for i in range(15)]
    assert (encoded.next_position, encoded.tokens_in) == (0, 15)
    changed = ids.clone()
    changed[:, 5] += 1
    differ = ~torch.isclose(method.compress(changed).states, encoded.states, atol=1e-4).all(-1)
    assert differ.tolist() == [[True] * 6 + [False] * 9] * 2
    grown = method.compress(ids[:, 12:], past=method.compress(ids[:, :12]))
    assert torch.equal(encoded.states, grown.states)
    torch.testing.assert_close(encoded.row(1).states, method.compress(ids[1:]).states, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_ratio_averages_states():
    method = cepe(ratio=4)
    ids = token_ids(tokens=8)
    encoded, every = method.compress(ids), method.compress(ids, ratio=1)
    assert encoded.slots == method.slots_for(8) == 2
    torch.testing.assert_close(encoded.states, every.states.unflatten(1, (2, 4)).mean(2))


def test_gradients_reach_what_is_trained_and_nothing_else():
    model = tiny_model("llama").requires_grad_(False)
    method = bound("cepe", model, encoder_layers=1)
    assert gradients(method, reading_loss(method, token_ids(), token_ids(seed=4))) == ([], [])
    assert not [name for name, _ in model.model.layers[1].named_modules() if "lora" in name]


@torch.no_grad()
def test_nothing_is_left_on_the_model_outside_reading_and_after():
    model = tiny_model("gemma3_text")
    ids = token_ids()
    before, hooked = logits_of(model, ids), hooks(model)
    method = bound("cepe", model, encoder_layers=1)
    encoded = method.compress(ids)
    with method.reading(encoded):
        assert hooks(model) != hooked
        assert not torch.equal(logits_of(model, ids), before)
    with pytest.raises(RuntimeError, match="stop"), method.reading(encoded):
        raise RuntimeError("stop")
    assert hooks(model) == hooked
    assert torch.equal(logits_of(model, ids), before)
    method.release()
    assert torch.equal(logits_of(model, ids), before)


@torch.no_grad()
def test_a_row_of_memory_serves_the_beams_that_read_it():
    method = cepe()
    encoded, ids = method.compress(token_ids(seed=4)), token_ids(rows=4)
    together = method.read(encoded, ids)
    for row in range(4):
        alone = method.read(encoded.row(row // 2), ids[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_mistakes_are_told():
    with pytest.raises(InputError, match="sink_tokens has to be 0"):
        available()["cepe"](sink_tokens=1)
    with pytest.raises(InputError, match="encoder_layers=2"):
        cepe(encoder_layers=2)
    method = cepe()
    with pytest.raises(InputError, match="first token"):
        method.read(method.compress(token_ids()), token_ids(), first=0)

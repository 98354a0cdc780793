"""LCIRC and its query-dependent form: the perceiver against a loop, recurrence, gates, places, and the question."""

import pytest
import torch

from longfit.compressors.soft import available
from longfit.compressors.soft.encoded import Encoded
from longfit.errors import InputError
from tests.encoders import FAMILIES, bound, gradients, logits_of, reading_loss, token_ids
from tests.tiny import tiny_model

SMALL = {"segment_tokens": 8, "ratio": 4, "layers": 2, "inner": 20}


def lcirc(family="llama", dtype=torch.float32, name="lcirc", model=None, **options):
    return bound(name, model or tiny_model(family, dtype), **{**SMALL, **options})


def hooks(model):
    return [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]


def attend(cross, latent, memory, heads=6):
    """One query [E] over a memory [n, E], head by head."""
    memory = torch.stack([cross.norm_memory(m) for m in memory])
    query = cross.query(cross.norm(latent)).view(heads, -1)
    out = []
    for h in range(heads):
        keys = torch.stack([cross.key(m).view(heads, -1)[h] for m in memory])
        values = torch.stack([cross.value(m).view(heads, -1)[h] for m in memory])
        out.append((keys @ query[h] / query.shape[1] ** 0.5).softmax(0) @ values)
    return cross.out(torch.cat(out))


@torch.no_grad()
def test_latents_equal_a_loop_and_are_the_next_segments_queries():
    method = lcirc()
    perceiver, ids = method.modules["perceiver"], token_ids(rows=1, tokens=13)
    embeds = method.backbone.embed(ids)[0]
    latents, expected = perceiver.latents, []
    for start, stop in ((0, 8), (8, 13)):
        segment = embeds[start:stop] + perceiver.positions[: stop - start]
        for cross, forward in zip(perceiver.attentions, perceiver.forwards, strict=True):
            latents = torch.stack([latent + attend(cross, latent, segment) for latent in latents])
            latents = latents + forward(latents)
        latents = perceiver.norm(latents)
        expected.append(latents)
    encoded = method.compress(ids)
    torch.testing.assert_close(encoded.states[0], torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert encoded.sources.tolist() == [[0, 8]] * 2 + [[8, 13]] * 2
    assert (encoded.slots, encoded.next_position, encoded.tokens_in) == (method.slots_for(13), 0, 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_with_closed_gates_reading_is_the_base_without_context_bit_for_bit(family, dtype):
    method = lcirc(family, dtype, awake=False)
    ids = token_ids()
    encoded = method.compress(token_ids(seed=4))
    assert torch.equal(method.read(encoded, ids), method.read(Encoded(0, encoded.sources[:0], 0), ids))


@torch.no_grad()
def test_blocks_stand_before_the_chosen_layers():
    model = tiny_model("llama", num_hidden_layers=3)
    method = lcirc(model=model, every=5)
    assert method.before == [0, 2]
    ids, encoded = token_ids(), method.compress(token_ids(seed=4))
    hidden, T = model.get_input_embeddings()(ids), ids.shape[1]
    tables = model.model.rotary_emb(hidden, torch.arange(T)[None])
    causal = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    blocks = dict(zip(method.before, method.modules["blocks"], strict=True))
    for index, layer in enumerate(model.model.layers):
        if index in blocks:
            block = blocks[index]
            keys, values = block.attention.project(encoded.states)
            hidden = hidden + block.attention_gate.tanh() * block.attention(hidden, keys, values)
            hidden = hidden + block.forward_gate.tanh() * block.feed_forward(hidden)
        hidden = layer(hidden, attention_mask=causal, position_embeddings=tables)
    expected = model.lm_head(model.model.norm(hidden))[:, :-1]
    torch.testing.assert_close(method.read(encoded, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_reads_the_earliest_segment(family):
    method = lcirc(family)
    ids, context = token_ids(), token_ids(seed=4, tokens=20)
    other = context.clone()
    other[:, 0] += 1
    ours = method.read(method.compress(context), ids)
    assert not torch.allclose(ours, method.read(method.compress(other), ids), atol=1e-5)
    assert torch.equal(ours, method.read(method.compress(context), ids))


@torch.no_grad()
def test_segments_longer_than_the_model_is_wide_and_growing():
    method = lcirc(segment_tokens=60, ratio=10)
    ids = token_ids(tokens=130)
    encoded = method.compress(ids)
    assert encoded.slots == method.slots_for(130) == 18
    grown = method.compress(ids[:, 120:], past=method.compress(ids[:, :120]))
    assert torch.equal(encoded.states, grown.states)
    torch.testing.assert_close(encoded.row(1).states, method.compress(ids[1:]).states, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["lcirc", "qd_lcirc"])
def test_gradients_reach_what_is_trained_and_nothing_else(name):
    model = tiny_model("llama").requires_grad_(False)
    method = lcirc(model=model, name=name)
    context, ids = token_ids(tokens=20), token_ids(seed=4)
    if name == "lcirc":
        loss = reading_loss(method, context, ids)
    else:
        with method.asking(token_ids(tokens=5, seed=9)):
            loss = reading_loss(method, context, ids)
    assert gradients(method, loss) == ([], [])


@torch.no_grad()
def test_nothing_is_left_on_the_model_outside_reading_and_after():
    model = tiny_model("gemma3_text")
    ids = token_ids()
    before, hooked = logits_of(model, ids), hooks(model)
    method = lcirc(model=model)
    with method.reading(method.compress(ids)):
        assert not torch.equal(logits_of(model, ids), before)
    assert hooks(model) == hooked
    assert torch.equal(logits_of(model, ids), before)
    method.release()
    assert torch.equal(logits_of(model, ids), before)


@torch.no_grad()
def test_the_question_shapes_the_memory():
    method = lcirc(name="qd_lcirc")
    ids, question = token_ids(tokens=20), token_ids(tokens=5, seed=9)
    with method.asking(question):
        ours = method.compress(ids)
    with method.asking(question[:1]):
        one_for_all = method.compress(ids)
    with method.asking(question + 1):
        theirs = method.compress(ids)
    assert not torch.allclose(ours.states, theirs.states, atol=1e-4)
    torch.testing.assert_close(one_for_all.states[0], ours.states[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="asking"):
        method.compress(ids)


@torch.no_grad()
def test_with_its_gate_closed_the_query_dependent_form_is_lcirc():
    plain, asked = lcirc(awake=False), lcirc(name="qd_lcirc", awake=False)
    asked.modules["perceiver"].load_state_dict(plain.modules["perceiver"].state_dict())
    ids = token_ids(tokens=20)
    with asked.asking(token_ids(tokens=5, seed=9)):
        assert torch.equal(plain.compress(ids).states, asked.compress(ids).states)


def test_mistakes_are_told():
    for options, said in (({"every": 0}, "every"), ({"sink_tokens": 1}, "sink_tokens"), ({"layers": 0}, "layers")):
        with pytest.raises(InputError, match=said):
            available()["lcirc"](**options)
    with pytest.raises(InputError, match="ratio 2 would need 4"):
        lcirc().compress(token_ids(), ratio=2)

"""Streaming against brute force: the same attention, written as full masks over the whole input."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

import longfit
from longfit.cache.layer import BoundedLayer
from tests.methods import METHODS
from tests.tiny import tiny_model

VISIBLE: dict[int, torch.Tensor] = {}


def masked_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Plain attention under the mask [H, T, T] that was recorded for this layer."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = (query @ key.mT * scaling).masked_fill(~VISIBLE[module.layer_idx], float("-inf"))
    return (logits.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("test_oracle", masked_attention)
AttentionMaskInterface.register("test_oracle", lambda **kwargs: None)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"kvzip"}))
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "llama_yarn"])
def test_streaming_is_masked_full_attention(family: str, method: str, monkeypatch) -> None:
    """What each query attended to is recorded while streaming; a full forward under those masks, without any cache,
    gives the same logits, for prefill chunks and decoded tokens alike."""
    model = tiny_model(family)
    H, L = model.config.num_attention_heads, model.config.num_hidden_layers
    prefill, decoded = 45, 9
    ids = torch.randint(3, 100, (1, prefill + decoded))
    T = ids.shape[1]
    VISIBLE.clear()
    VISIBLE.update({layer: torch.zeros(H, T, T, dtype=torch.bool) for layer in range(L)})
    finish = BoundedLayer.finish

    def record(layer, looks, scaling):
        for part, look in zip(layer.parts, looks, strict=True):
            Q = look.queries.shape[2]
            group = H // layer.chunk[0].shape[1]
            for local, head in enumerate(range(part.heads.start, part.heads.stop)):
                rows = torch.arange(layer.seen, layer.seen + Q)
                for h in range(head * group, (head + 1) * group):
                    mask = VISIBLE[layer.index][h]
                    if part.store is not None:
                        mask[rows[:, None], part.store.positions[0, local].long()] = True
                    mask[rows[:, None], rows] = rows[:, None] >= rows
        finish(layer, looks, scaling)

    monkeypatch.setattr(BoundedLayer, "finish", record)
    wrapped = longfit.wrap(model, METHODS[method](), budget="20 tokens", chunk_tokens=12, geometry="original")
    outputs = wrapped(ids[:, :prefill], use_cache=True)
    logits = [outputs.logits]
    for t in range(prefill, T):
        outputs = wrapped(ids[:, t : t + 1], past_key_values=outputs.past_key_values, use_cache=True)
        logits.append(outputs.logits)
    longfit.unwrap(model)
    assert not VISIBLE[0][0].tril().eq(torch.ones(T, T).tril().bool()).all(), "nothing was dropped"
    model.set_attn_implementation("test_oracle")
    expected = model(ids, use_cache=False).logits
    assert torch.allclose(torch.cat(logits, 1), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "llama_yarn", "qwen3", "phi3", "gpt_neox", "gemma3_text"])
def test_packed_positions_are_those_of_the_kept_tokens_alone(family: str) -> None:
    """In a model of one layer keys depend on nothing but their own token, so a packed cache must answer exactly as
    the base model does on the kept tokens and the chunk put together."""
    changes = {"num_hidden_layers": 1}
    if family == "gemma3_text":
        changes |= {"layer_types": ["full_attention"]}
    model = tiny_model(family, **changes)
    ids = torch.randint(3, 100, (1, 64))
    wrapped = longfit.wrap(model, "streaming_llm", budget="20 tokens", chunk_tokens=16)
    outputs = wrapped(ids[:, :48], use_cache=True, logits_to_keep=1)
    kept = outputs.past_key_values.bounded[0].parts[0].store.positions[0, 0].long().tolist()
    assert kept == [0, 1, 2, 3, *range(32, 48)]
    cache = outputs.past_key_values
    given = [wrapped(ids[:, 48 + t : 49 + t], past_key_values=cache, use_cache=True).logits for t in range(1)]
    longfit.unwrap(model)
    kept = kept[:4] + kept[5:]  # room was made for the decoded token: the oldest after the sinks yields
    # Decoding starts from positions numbered over all 20 kept entries, and the hole that the dropped one leaves stays.
    positions = torch.tensor([[0, 1, 2, 3, *range(5, 20), 20]])
    expected = model(ids[:, [*kept, 48]], position_ids=positions).logits[:, -1:]
    assert torch.allclose(given[0], expected, atol=2e-3, rtol=1e-3)


def test_packed_stream_goes_past_the_window() -> None:
    model = tiny_model("llama", max_position_embeddings=64)
    ids = torch.randint(3, 100, (1, 400))
    wrapped = longfit.wrap(model, "streaming_llm", budget="30 tokens", chunk_tokens=16)
    seen: list[int] = []
    rotary = model.model.rotary_emb
    hook = rotary.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(int((kwargs.get("position_ids", args[-1])).max())),
        with_kwargs=True,
    )
    answer = wrapped.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
    hook.remove()
    assert answer.shape[1] == 480
    assert max(seen) < 64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_every_method_can_pack_its_positions(family: str, method: str) -> None:
    """Packed positions through prefill, decoding and a second turn; with nothing dropped they are the original ones."""
    model = tiny_model(family)
    ids = torch.randint(3, 100, (1, 50))
    how = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    wrapped = longfit.wrap(model, METHODS[method](), budget="100%", chunk_tokens=12, geometry="packed")
    assert torch.equal(wrapped.generate(ids, attention_mask=torch.ones_like(ids), **how), expected)
    wrapped = longfit.wrap(model, METHODS[method](), budget="24 tokens", chunk_tokens=12, geometry="packed")
    first = wrapped.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **how)
    longer = torch.cat([first.sequences, torch.randint(3, 100, (1, 30))], 1)
    cache = first.past_key_values
    second = wrapped.generate(longer, attention_mask=torch.ones_like(longer), past_key_values=cache, **how)
    assert second.shape[1] == 50 + 12 + 30 + 12
    assert 23 <= wrapped.fit_report.kept_tokens <= 24


def test_remembered_queries_follow_the_packed_positions() -> None:
    """Scores of a window that ended in the last chunk are the same before and after the renumbering."""
    model = tiny_model("llama")
    ids = torch.randint(3, 100, (1, 40))
    wrapped = longfit.wrap(model, METHODS["snapkv"](), budget="24 tokens", chunk_tokens=40, geometry="packed")
    cache = wrapped(ids, use_cache=True).past_key_values
    layer = cache.bounded[0]
    part = layer.parts[0]
    before = layer.rotary.rotate(part.store.keys, part.store.positions.long())
    logits = part.queries[:, :2] @ before[:, :1].mT
    cache.begin(1, None, 1, phase="decode", total_tokens=41)
    # Distances to kept keys shrink by the holes between; the newest entries, behind the last hole, keep theirs.
    after = layer.parts[0].queries[:, :2] @ part.store.keys[:, :1].mT
    assert torch.allclose(after[..., -6:], logits[..., -6:], atol=1e-3)

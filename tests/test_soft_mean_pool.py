"""Mean pooling: what a slot is, that it sees both ways, and what is trained."""

import pytest
import torch

from longfit.compressors.soft.modules import rms
from tests.encoders import FAMILIES, bound, gradients, logits_of, reading_loss, token_ids, wake
from tests.tiny import tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slot_is_the_mapped_mean_of_its_groups_hidden_states(family):
    method = bound("mean_pool", family=family, ratio=4, sink_tokens=1)
    ids = token_ids(tokens=11)
    encoded = method.compress(ids)
    with method.encoding():
        n = 10
        mask = torch.ones(1, 1, n, n, dtype=torch.bool)
        if family == "gemma3_text":
            near = (torch.arange(n)[:, None] - torch.arange(n)).abs() < 8
            mask = {"full_attention": mask, "sliding_attention": mask & near}
        hidden = method.backbone.decoder(input_ids=ids[:, 1:], attention_mask=mask).last_hidden_state
    embeds = method.backbone.embed(ids)
    projector = method.modules["projector"]
    expected = [embeds[:, 0]]
    for start, stop in ((0, 4), (4, 8), (8, 10)):
        mean = hidden[:, start:stop].mean(1)
        mapped = projector.scale * ((mean / rms(mean)) @ projector.maps[0].weight.T)
        expected.append(embeds[:, 1 + start : 1 + stop].mean(1) + mapped)
    torch.testing.assert_close(encoded.soft, torch.stack(expected, 1), atol=1e-4, rtol=1e-4)
    assert encoded.sources.tolist() == [[0, 1], [1, 5], [5, 9], [9, 11]]
    assert (encoded.tokens_in, encoded.next_position, encoded.slots) == (11, 4, method.slots_for(11))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_last_token_changes_the_first_slot(attention):
    method = bound("mean_pool", attention=attention)
    ids = token_ids(tokens=9)
    other = ids.clone()
    other[:, -1] += 1
    assert not torch.allclose(method.compress(ids).soft[:, 1], method.compress(other).soft[:, 1], atol=1e-4)


def test_several_ratios_share_one_pass():
    method = bound("mean_pool", segment_tokens=10)
    ids = token_ids(tokens=25)
    together = method.compress_by_ratio(ids, (2, 4, 8))
    assert list(together) == [2, 4, 8]
    for ratio, encoded in together.items():
        alone = method.compress(ids, ratio=ratio)
        assert torch.equal(encoded.soft, alone.soft) and torch.equal(encoded.sources, alone.sources)
    assert method.compress_by_ratio(ids[:, :1], (2,))[2].slots == 1


def test_untrained_slots_are_mean_embeddings():
    method = bound("mean_pool", ratio=4, sink_tokens=0, awake=False)
    ids = token_ids(tokens=8)
    embeds = method.backbone.embed(ids).unflatten(1, (2, 4)).mean(2)
    torch.testing.assert_close(method.compress(ids).soft, embeds)


@pytest.mark.parametrize("reader", [True, False])
def test_gradients_reach_what_is_trained_and_nothing_else(reader):
    model = tiny_model("llama").requires_grad_(False)
    method = bound("mean_pool", model, reader_adapter=reader)
    without, base = gradients(method, reading_loss(method, token_ids(), token_ids(seed=4), first=0))
    assert (without, base) == ([], [])
    assert set(method.parameters()) == {"encoder", "projector"} | ({"reader"} if reader else set())


def test_segments_are_compressed_alone_and_rows_do_not_mix():
    method = bound("mean_pool", segment_tokens=6, sink_tokens=1)
    ids = token_ids(rows=2, tokens=15)
    encoded = method.compress(ids)
    assert encoded.slots == method.slots_for(15) == 1 + 2 + 2 + 1
    assert encoded.sources[:, 1].max() == 15
    grown = method.compress(ids[:, 12:], past=method.compress(ids[:, :12]))
    assert torch.equal(encoded.soft, grown.soft) and torch.equal(encoded.sources, grown.sources)
    torch.testing.assert_close(encoded.row(1).soft, method.compress(ids[1:]).soft, atol=1e-5, rtol=1e-5)
    assert method.compress(ids[:, :1]).slots == 1


def test_reading_twice_is_reading_once():
    method = bound("mean_pool")
    encoded, question = method.compress(token_ids()), token_ids(seed=8)
    once = method.read(encoded, question)
    method.read(encoded, token_ids(seed=9))
    assert torch.equal(once, method.read(encoded, question))


def test_the_base_is_bit_equal_outside_and_after():
    model = tiny_model("qwen3")
    ids = token_ids()
    before = logits_of(model, ids)
    method = bound("mean_pool", model)
    method.read(method.compress(ids), ids)
    assert torch.equal(logits_of(model, ids), before)
    method.release()
    assert torch.equal(logits_of(model, ids), before)
    assert not [name for name, _ in model.named_modules() if "lora" in name]


def test_bfloat16_keeps_slots_in_the_readers_dtype_and_modules_in_fp32():
    method = bound("mean_pool", dtype=torch.bfloat16)
    wake(method)
    encoded = method.compress(token_ids())
    assert encoded.soft.dtype == torch.bfloat16
    assert {p.dtype for p in method.parameters()["projector"]} == {torch.float32}
    assert torch.isfinite(method.read(encoded, token_ids(seed=6)).float()).all()


@pytest.mark.parametrize("name", ["mean_pool", "arc"])
def test_slots_are_taught_to_stand_near_the_tokens_of_their_group(name):
    own = {"cut_layers": 1} if name == "arc" else {}
    method = bound(name, ratio=4, sink_tokens=1, segment_tokens=9, **own)
    wake(method)
    ids = token_ids(tokens=15)
    encoded = method.compress(ids)
    loss = method.auxiliary(encoded, ids, 4)["slot_ae"]
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in method.parameters()["encoder"])
    table = method.backbone.model.get_input_embeddings().weight.detach()
    each = []
    for row in range(ids.shape[0]):
        for slot, (start, stop) in enumerate(encoded.sources.tolist()):
            for at in range(start, stop) if slot else []:
                near = 20 * torch.cosine_similarity(encoded.soft[row, slot].detach()[None], table)
                each.append(-near.log_softmax(0)[ids[row, at]])
    torch.testing.assert_close(loss.detach(), torch.stack(each).mean(), rtol=1e-4, atol=1e-4)

"""What is kept of a pass: rotary moves, packed and original positions, rows that keep their own tokens."""

import pytest
import torch

from longfit.compressors.soft.backbone import Backbone
from longfit.compressors.soft.encoded import Encoded, Entries
from longfit.compressors.soft.store import moved, stored
from longfit.errors import UnsupportedModelError
from tests.soft_models import FAMILIES, words
from tests.tiny import tiny_model

MORE = [*FAMILIES, "llama_scaled", "llama_yarn", "phi3"]


@pytest.mark.parametrize("family", MORE)
@torch.no_grad()
def test_a_moved_key_is_the_key_computed_there(family):
    backbone = Backbone(tiny_model(family))
    embeds = backbone.embed(words(2, 6))
    here, there = torch.arange(20, 26), torch.arange(6)
    at, wanted = backbone.run(embeds, here).entries[0], backbone.run(embeds, there).entries[0]
    given = moved(backbone.rotary(0), at, there)
    torch.testing.assert_close(given.keys, wanted.keys, rtol=1e-4, atol=1e-4)
    assert torch.equal(given.values, at.values) and torch.equal(given.positions, there)
    back = moved(backbone.rotary(0), given, here)
    torch.testing.assert_close(back.keys, at.keys, rtol=1e-4, atol=1e-4)


def test_packing_without_rotary_embeddings_is_refused():
    entries = Entries(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.arange(2))
    with pytest.raises(UnsupportedModelError, match="rotary"):
        moved(None, entries, torch.arange(2))


@torch.no_grad()
def test_packed_segments_stand_one_behind_the_other():
    backbone, sources = Backbone(tiny_model("gemma3_text")), torch.tensor([[0, 3], [3, 6]])
    kept, memory = torch.tensor([2, 5]), None
    for start in (0, 6, 12):
        embeds = backbone.embed(words(1, 6, start))
        given = backbone.run(embeds, torch.arange(start, start + 6))
        memory = stored(backbone, given.entries, kept, sources + start, memory, start + 6, packed=True)
    assert memory.slots == memory.next_position == 6
    assert memory.layers[1].positions.tolist() == list(range(6))
    assert memory.layers[0].positions.tolist() == list(range(-1, 6))  # 7 of a window of 8, ending where the memory does
    assert memory.sources.tolist() == [[0, 3], [3, 6], [6, 9], [9, 12], [12, 15], [15, 18]]


def test_rows_may_keep_their_own_tokens():
    keys = torch.randn(2, 1, 4, 3)
    entries = Entries(keys, keys + 1, torch.arange(4))
    own = entries.pick(torch.tensor([[0, 3], [1, 2]]))
    assert torch.equal(own.keys[1], keys[1][:, [1, 2]]) and torch.equal(own.values[0], keys[0][:, [0, 3]] + 1)
    joined = entries.join(own)
    assert joined.positions.tolist() == [[0, 1, 2, 3, 0, 3], [0, 1, 2, 3, 1, 2]]
    sources = torch.stack([joined.positions, joined.positions + 1], -1)
    encoded = Encoded(4, sources, 4, layers=(joined,), scores=torch.arange(12.0).reshape(2, 6))
    alone = encoded.row(1)
    assert alone.layers[0].positions.tolist() == [0, 1, 2, 3, 1, 2]
    assert alone.sources.shape == (6, 2) and alone.scores.tolist() == [[6, 7, 8, 9, 10, 11]]
    assert encoded.slots == alone.slots == 6
    twice = encoded.repeated(2)
    assert twice.rows == 4 and torch.equal(twice.layers[0].positions[2], twice.layers[0].positions[3])


@torch.no_grad()
def test_some_tokens_may_not_see_the_past():
    backbone = Backbone(tiny_model("llama"))
    past = backbone.run(backbone.embed(words(1, 5)), torch.arange(5)).entries
    embeds, positions = backbone.embed(words(1, 2, 1)), torch.arange(5, 7)
    blind = torch.eye(2, dtype=torch.bool)
    given = backbone.run(embeds, positions, past, allowed=blind, sees_past=torch.tensor([True, False])).hidden
    alone = backbone.run(embeds[:, 1:], positions[1:]).hidden
    sighted = backbone.run(embeds[:, :1], positions[:1], past).hidden
    torch.testing.assert_close(given, torch.cat([sighted, alone], 1), rtol=1e-4, atol=1e-4)

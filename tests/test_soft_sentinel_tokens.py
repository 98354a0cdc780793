"""Sentinel tokens: spans are local, text keeps its positions, nothing is claimed that is not dropped."""

import pytest
import torch

from longfit.compressors.soft.layout import allowed
from longfit.compressors.soft.places import after_groups, around_groups
from longfit.compressors.soft.sentinel_tokens import visible
from tests.soft_models import shared, words


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("keep_raw", [False, True])
@torch.no_grad()
def test_segments_are_the_sentinel_mask_in_one_pass(keep_raw, family):
    compressor = shared("sentinel_tokens keep_raw" if keep_raw else "sentinel_tokens", family)
    ids, asked = words(2, 19), words(2, 5, 1)  # after the sink, 9 + 9 tokens: spans and segments fall together
    backbone, slots = compressor.backbone, compressor.modules["slots"]
    encoded = compressor.compress(ids[:, 10:], compressor.encode(ids[:, :10], None, 3))
    lay = after_groups if keep_raw else around_groups
    places = lay(19, 1, 3)
    N = places.slots.shape[0]
    rows = torch.zeros(N, dtype=torch.long) if keep_raw else torch.arange(N) // (N // 2)
    embeds = places.mix(backbone.embed(ids), slots(2, torch.float32, rows))
    embeds = torch.cat([embeds, backbone.embed(asked)], 1)
    owners = torch.cat([places.owners(1), torch.full((5,), 99)])
    closes = torch.zeros(places.total + 5, dtype=torch.bool)
    closes[places.kept[1:]] = True
    opens = torch.zeros(places.total + 5, dtype=torch.bool)
    opens[places.slots] = True
    mask = allowed(owners, closes, scope="span", keep_raw=keep_raw, alone=opens & ~closes)
    positions = torch.cat([places.text_positions(0), torch.arange(19, 24)])
    with compressor.encoding():
        given = backbone.run(embeds, positions, allowed=mask)
    kept = torch.arange(places.total) if keep_raw else places.kept
    for whole, entries in zip(given.entries, encoded.layers, strict=True):
        assert torch.equal(whole.positions[kept], entries.positions)
        torch.testing.assert_close(whole.keys[:, :, kept], entries.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole.values[:, :, kept], entries.values, rtol=1e-4, atol=1e-4)
    logits = backbone.logits(given.hidden[:, places.total : -1])
    torch.testing.assert_close(logits, compressor.read(encoded, asked), rtol=1e-3, atol=1e-3)


def test_who_sees_whom():
    seen = visible(around_groups(5, 1, 2), 1, keep_raw=False)  # s ( t t ) ( t t )
    rows = ["".join("x" if sees else "." for sees in row) for row in seen]
    assert rows == [
        "x........",
        ".x.......",  # opening: itself
        "xxx......",
        "xxxx.....",
        ".xxxx....",  # closing: its span and its opening, not the sink
        ".....x...",
        "x...xxx..",  # text: its span, the sink, closings before
        "x...xxxx.",
        ".....xxxx",
    ]


@torch.no_grad()
def test_a_sentinel_is_local_to_its_span():
    compressor, ids = shared("sentinel_tokens", "llama"), words(1, 7)  # sink, two spans of 3
    changed = ids.clone()
    changed[:, 1:4] = words(1, 3, 9)
    one, other = compressor.compress(ids).layers[1], compressor.compress(changed).layers[1]
    assert torch.equal(one.keys[:, :, 2], other.keys[:, :, 2])  # after one layer: own span only
    assert not torch.equal(one.keys[:, :, 1], other.keys[:, :, 1])


@torch.no_grad()
def test_sentinels_repeat_the_position_before_them():
    encoded = shared("sentinel_tokens", "llama").compress(words(1, 20))
    for entries in encoded.layers:
        assert torch.equal(entries.positions, encoded.sources[:, 1] - 1)
    assert encoded.next_position == 20


@torch.no_grad()
def test_keeping_the_text_drops_nothing_and_says_so():
    compressor = shared("sentinel_tokens keep_raw", "llama")
    encoded = compressor.compress(words(1, 20))
    assert encoded.slots == compressor.slots_for(20) == 20 + 3 + 3 + 1
    single = encoded.sources[:, 1] - encoded.sources[:, 0] == 1
    assert set(range(20)) <= set(encoded.sources[single, 0].tolist())

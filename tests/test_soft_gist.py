"""Gist tokens: segment by segment is the gist mask in one pass; the auto-encoding loss."""

import pytest
import torch

from longfit.compressors.soft import available
from longfit.compressors.soft.layout import allowed
from longfit.compressors.soft.places import after_groups, appended
from longfit.compressors.soft.weak_decoder import WeakDecoder, slot_entries
from longfit.errors import InputError
from tests.soft_models import bound, shared, words


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("case", ["gist", "gist coarse"])
@torch.no_grad()
def test_segments_are_the_gist_mask_in_one_pass(case, family):
    compressor, ids, asked = shared(case, family), words(2, 23), words(2, 6, 1)
    lay = after_groups if case == "gist" else appended
    parts, groups, slots, positions, at = [], [], [], [], 0
    for segment, start in enumerate((0, 9, 18)):
        tokens = compressor.backbone.embed(ids[:, start : start + 9])
        places = lay(tokens.shape[1], 0 if segment else 1, 3, start)
        parts.append(places.mix(tokens, compressor.slots(places, tokens)))
        group = torch.full((places.total,), segment)
        if not segment:
            group[0] = -1
        groups.append(group)
        slots.append(places.slots + at)
        positions.append(places.text_positions(start))
        at += places.total
    parts.append(compressor.backbone.embed(asked))
    groups.append(torch.full((6,), 3))
    positions.append(torch.arange(23, 29))
    is_slot = torch.zeros(at + 6, dtype=torch.bool)
    is_slot[torch.cat(slots)] = True
    mask = allowed(torch.cat(groups), is_slot, scope="segment", keep_raw=False)
    with compressor.encoding():
        given = compressor.backbone.run(torch.cat(parts, 1), torch.cat(positions), allowed=mask)
    encoded = compressor.compress(ids)
    kept = torch.cat([torch.zeros(1, dtype=torch.long), *slots])
    for whole, entries in zip(given.entries, encoded.layers, strict=True):
        assert torch.equal(whole.positions[kept], entries.positions)
        torch.testing.assert_close(whole.keys[:, :, kept], entries.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole.values[:, :, kept], entries.values, rtol=1e-4, atol=1e-4)
    logits = compressor.backbone.logits(given.hidden[:, at:-1])
    torch.testing.assert_close(logits, compressor.read(encoded, asked), rtol=1e-3, atol=1e-3)


class TestAutoencoding:
    def test_the_decoder_learns_to_spell_from_slots_alone(self):
        compressor, ids = bound("gist", "llama", autoencode_slots=100), words(1, 19)
        encoded = compressor.compress(ids).detach()
        decoder = compressor.modules["autoencoder"]
        optimiser = torch.optim.Adam(decoder.parameters(), lr=0.01)
        losses = []
        for _ in range(60):
            loss = compressor.auxiliary(encoded, ids, 3)["slot_ae"]
            losses.append(float(loss))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert losses[-1] < 0.3 * losses[0]

    def test_it_reaches_the_gists_keys_and_values(self):
        compressor, ids = bound("gist", "llama"), words(1, 19)
        encoded = compressor.compress(ids)
        for entries in encoded.layers:
            entries.keys.retain_grad()
            entries.values.retain_grad()
        compressor.auxiliary(encoded, ids, 3)["slot_ae"].backward()
        for entries in encoded.layers:
            assert entries.keys.grad[:, :, 1:].abs().sum() > 0 and entries.values.grad[:, :, 1:].abs().sum() > 0
            assert entries.keys.grad[:, :, 0].abs().sum() == 0  # the sink is spelled by nothing

    @torch.no_grad()
    def test_what_it_reads_does_not_depend_on_the_position(self):
        compressor = shared("gist", "llama")
        backbone, slot = compressor.backbone, torch.tensor([0])
        embeds = backbone.embed(words(1, 1))
        seen = []
        for at in (0, 37):
            entries = backbone.run(embeds, torch.tensor([at])).entries
            encoded = compressor.compress(words(1, 1))
            encoded = type(encoded)(1, encoded.sources, 1, layers=entries)
            seen.append(slot_entries(backbone, encoded, slot))
        torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)

    def test_a_token_is_predicted_from_those_before_it(self):
        decoder = WeakDecoder(2, 8, torch.randn(20, 12))
        entries, tokens = torch.randn(3, 2, 8), torch.randn(3, 4, 12)
        changed = tokens.clone()
        changed[:, 2:] = torch.randn(3, 2, 12)
        one, other = decoder(entries, tokens), decoder(entries, changed)
        torch.testing.assert_close(one[:, :3], other[:, :3])
        assert (one[:, 3] - other[:, 3]).abs().max() > 1e-3


def test_more_gists_than_there_are_embeddings_are_refused():
    compressor = bound("gist coarse", "llama")
    with pytest.raises(InputError, match="4 slots are needed and 3 were made"):
        compressor.compress(words(1, 9), ratio=2)


@pytest.mark.parametrize("tokens", [1, 2, 5, 14])
def test_gists_that_start_as_the_mean_of_their_tokens(tokens):
    compressor, ids = bound("gist", "llama", slot_start="mean"), words(2, tokens)
    embeds, learned = compressor.backbone.embed(ids), compressor.modules["slots"].weight[0]
    places = compressor.places(ids, None, 4)
    sinks = compressor.sink_tokens
    groups = [embeds[:, start : start + 4].mean(1) for start in range(sinks, tokens, 4)]
    made = compressor.slots(places, embeds)
    assert made.shape[1] == len(groups)
    for slot, group in enumerate(groups):
        torch.testing.assert_close(made[:, slot], group + learned)
    assert compressor.compress(ids).slots == compressor.slots_for(tokens)


def test_options_are_checked():
    with pytest.raises(InputError, match="slot_start"):
        available()["gist"](slot_start="median")
    with pytest.raises(InputError, match="stands for its own tokens"):
        available()["gist"](form="coarse", slot_start="mean")
    with pytest.raises(InputError, match="form"):
        available()["gist"](form="medium")
    with pytest.raises(InputError, match="autoencode"):
        available()["gist"](form="coarse", autoencode=True)

"""Activation Beacon: projections that act at slots and nowhere else, and packed positions."""

import pytest
import torch
from torch import nn

from longfit.compressors.soft.places import after_groups
from longfit.compressors.soft.projections import SlotProjections, projections
from longfit.errors import UnsupportedModelError
from tests.soft_models import FAMILIES, bound, shared, words


@pytest.mark.parametrize("family", FAMILIES)
class TestProjections:
    @torch.no_grad()
    def test_they_start_as_the_model_s(self, family):
        compressor = bound("beacon", family)
        backbone, slots = compressor.backbone, torch.tensor([2, 5])
        embeds, positions = backbone.embed(words(2, 6)), torch.arange(6)
        plain = backbone.run(embeds, positions)
        with compressor.modules["projections"].acting(backbone.layers, slots):
            own = backbone.run(embeds, positions)
        torch.testing.assert_close(own.hidden, plain.hidden, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_they_act_at_slots_only_and_only_inside(self, family):
        compressor = shared("beacon", family)
        backbone, slots = compressor.backbone, torch.tensor([2, 5])
        embeds, positions = backbone.embed(words(2, 6)), torch.arange(6)
        plain = backbone.run(embeds, positions)
        with compressor.modules["projections"].acting(backbone.layers, slots):
            own = backbone.run(embeds, positions).entries[0]
        base, text = plain.entries[0], torch.tensor([0, 1, 3, 4])
        for a, b in ((own.keys, base.keys), (own.values, base.values)):
            assert torch.equal(a[:, :, text], b[:, :, text])
            assert (a[:, :, slots] - b[:, :, slots]).abs().amin((0, 1, 3)).min() > 0
        assert torch.equal(backbone.run(embeds, positions).hidden, plain.hidden)
        assert not any(module._forward_hooks for layer in backbone.layers for module in projections(layer).values())

    @torch.no_grad()
    def test_hooks_go_when_a_pass_fails(self, family):
        compressor = shared("beacon", family)
        layers = compressor.backbone.layers
        with pytest.raises(RuntimeError), compressor.modules["projections"].acting(layers, torch.tensor([0])):
            raise RuntimeError
        assert not any(module._forward_hooks for layer in layers for module in projections(layer).values())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@torch.no_grad()
def test_memory_is_at_packed_positions(family):
    compressor, ids = shared("beacon", family), words(1, 18)
    encoded, backbone = compressor.compress(ids), compressor.backbone
    assert encoded.layers[0].positions.tolist() == list(range(7)) and encoded.next_position == 7
    # In the first layer a beacon's key depends on nothing but its embedding and its position.
    beacon = compressor.modules["slots"](1, torch.float32, torch.zeros(7, dtype=torch.long))
    with compressor.modules["projections"].acting(backbone.layers, torch.arange(7)):
        direct = backbone.run(beacon, torch.arange(7)).entries[0]
    torch.testing.assert_close(encoded.layers[0].keys[:, :, 1:], direct.keys[:, :, 1:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_segment_is_one_causal_pass_over_text_and_beacons():
    compressor, ids = bound("beacon", "llama"), words(1, 9)
    encoded, backbone = compressor.compress(ids), compressor.backbone
    places, tokens = after_groups(9, 1, 3), backbone.embed(ids)
    beacons = compressor.modules["slots"](1, torch.float32, torch.zeros(3, dtype=torch.long))
    given = backbone.run(places.mix(tokens, beacons), torch.arange(12)).entries[1]
    torch.testing.assert_close(encoded.layers[1].values, given.pick(places.kept).values, rtol=1e-4, atol=1e-4)


def test_layers_without_projections_are_refused():
    with pytest.raises(UnsupportedModelError, match="layer 0"):
        SlotProjections([nn.Identity()])

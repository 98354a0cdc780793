"""Memory from appended slots: AutoCompressor, ICAE and 500xCompressor."""

import random

import pytest
import torch

from longfit.compressors.soft import available
from longfit.compressors.soft.embeddings import token_nearness
from longfit.compressors.soft.modules import rms
from longfit.errors import InputError
from tests.soft_models import FAMILIES, bound, shared, words


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["autocompressor", "icae"])
@torch.no_grad()
def test_slots_start_at_the_size_of_embeddings(case, family):
    compressor = bound(case, family)
    soft = compressor.compress(words(1, 18)).soft
    usual = rms(compressor.backbone.vocabulary()).mean()
    torch.testing.assert_close(rms(soft[:, 1:]).mean(), usual, rtol=1e-3, atol=1e-3)


class TestAutoCompressor:
    def gradient_at_first(self, detach_every: int) -> float:
        """How much what is read depends on the first segment's embeddings, through the graph."""
        compressor, ids = bound("autocompressor", "llama", trained=True, detach_every=detach_every), words(1, 36)
        taken, embed = [], compressor.backbone.embed

        def watched(given):
            out = embed(given).detach().requires_grad_()
            taken.append(out)
            return out

        compressor.backbone.embed = watched
        encoded = compressor.compress(ids)
        compressor.read(encoded, words(1, 4, 1)).square().sum().backward()
        first = taken[0].grad
        return 0.0 if first is None else float(first.abs().sum())

    def test_the_graph_is_cut_after_so_many_segments(self):
        assert self.gradient_at_first(0) > 0 and self.gradient_at_first(4) > 0
        assert self.gradient_at_first(2) == 0.0

    @torch.no_grad()
    def test_cutting_the_graph_changes_no_value(self):
        ids = words(1, 36)
        cut, whole = (bound("autocompressor", "llama", trained=True, detach_every=n).compress(ids) for n in (1, 0))
        assert torch.equal(cut.soft, whole.soft)

    @torch.no_grad()
    def test_segments_are_random_in_training_only(self):
        compressor = bound("autocompressor", "llama")
        assert compressor.spans(27) == [(0, 9), (9, 18), (18, 27)]
        compressor.rng = random.Random(0)
        drawn = {tuple(compressor.spans(27)) for _ in range(20)}
        assert len(drawn) > 5
        assert all(len(spans) == 4 and max(b - a for a, b in spans) <= 9 for spans in drawn)
        assert compressor.compress(words(1, 27)).tokens_in == 27
        assert compressor.spans(9)[-1][1] == 9 and compressor.spans(1) == [(0, 1)]

    @torch.no_grad()
    def test_segments_read_the_memory_before_them(self):
        compressor, ids = shared("autocompressor", "llama"), words(1, 18)
        other = torch.cat([words(1, 9, 7), ids[:, 9:]], 1)
        assert not torch.equal(compressor.compress(ids).soft[:, 4:], compressor.compress(other).soft[:, 4:])

    @torch.no_grad()
    def test_replaced_memory_keeps_its_size_and_stands_for_all(self):
        compressor = shared("autocompressor replacing", "llama")
        one, two = compressor.compress(words(1, 9)), compressor.compress(words(1, 18))
        assert (one.slots, two.slots) == (4, 4)
        assert two.sources[1:].tolist() == [[1, 18]] * 3
        assert torch.equal(one.soft[:, :1], two.soft[:, :1])

    @torch.no_grad()
    @pytest.mark.parametrize("placed", ["after", "spread"])
    def test_slots_stand_after_the_segment_or_at_the_last_token_of_their_group(self, placed):
        compressor = bound("autocompressor", "llama", trained=True, slot_positions=placed)
        ran, run = [], compressor.backbone.run

        def watched(embeds, positions):
            ran.append(positions.tolist())
            return run(embeds, positions)

        compressor.backbone.run = watched
        encoded = compressor.compress(words(1, 15))  # 9 and 6 tokens, the first of them a sink; 3 and 2 slots
        first, second = list(range(9)), list(range(4, 10))
        assert encoded.slots == 1 + 3 + 2
        if placed == "after":
            assert ran == [[*first, 9, 10, 11], [0, 1, 2, 3, *second, 10, 11]]
        else:
            assert ran == [[*first, 3, 6, 8], [0, 1, 2, 3, *second, 6, 9]]

    def test_slots_are_taught_to_stand_near_the_tokens_of_their_group(self):
        compressor, ids = bound("autocompressor", "llama", trained=True), words(1, 15)
        encoded = compressor.compress(ids)
        loss = compressor.auxiliary(encoded, ids, 3)["slot_ae"]
        loss.backward()
        assert compressor.modules["slots"].weight.grad.abs().sum() > 0
        # Slow reference: every token of segments 1..8 and 9..14, in groups of three, against the whole table.
        table, slots = compressor.backbone.model.get_input_embeddings().weight.detach(), encoded.soft[0].detach()
        places = [(at, 1 + (at - 1) // 3) for at in range(1, 9)] + [(at, 4 + (at - 9) // 3) for at in range(9, 15)]
        expected = []
        for segment in (places[:8], places[8:]):
            each = []
            for at, slot in segment:
                near = torch.tensor([20 * torch.cosine_similarity(slots[slot], row, dim=0) for row in table])
                each.append(-near.log_softmax(0)[ids[0, at]])
            expected.append(torch.stack(each).mean())
        torch.testing.assert_close(loss.detach(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_slots_at_their_tokens_embeddings_have_nothing_left_to_learn(self):
        table = torch.eye(50)
        ids = words(2, 6) % 50
        exact = token_nearness(table[ids], ids, torch.ones(6, dtype=torch.long), table)
        wrong = token_nearness(table[(ids + 1) % 50], ids, torch.ones(6, dtype=torch.long), table)
        assert exact < 1e-5 and wrong > 19

    def test_a_replaced_memory_has_no_slots_of_tokens(self):
        compressor, ids = bound("autocompressor replacing", "llama", trained=True), words(1, 18)
        assert compressor.auxiliary(compressor.compress(ids), ids, 3) == {}

    def test_what_cannot_be(self):
        with pytest.raises(InputError, match="slot_positions"):
            available()["autocompressor"](slot_positions="before")
        with pytest.raises(InputError, match="lowest_ratio"):
            available()["autocompressor"](ratio=4, lowest_ratio=8)
        with pytest.raises(InputError, match="lowest ratio in use"):
            bound("autocompressor", "llama").compress(words(1, 9), ratio=1)
        assert bound("autocompressor spread", "llama").compress(words(1, 9), ratio=1).slots == 9


class TestICAE:
    @pytest.mark.parametrize("family", FAMILIES)
    @torch.no_grad()
    def test_the_reader_is_the_base_model(self, family):
        compressor, asked = shared("icae", family), words(1, 5, 1)
        encoded, model = compressor.compress(words(1, 20)), compressor.backbone.model
        embeds = torch.cat([encoded.soft, compressor.backbone.embed(asked)], 1)
        whole = model(inputs_embeds=embeds).logits[:, encoded.slots : -1]
        torch.testing.assert_close(compressor.read(encoded, asked), whole, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("case", ["icae", "compressor_500x"])
    @torch.no_grad()
    def test_segments_are_encoded_alone(self, case):
        compressor, ids = shared(case, "llama"), words(1, 18)
        other = torch.cat([words(1, 9, 7), ids[:, 9:]], 1)
        one, two = compressor.compress(ids), compressor.compress(other)
        if case == "icae":
            assert torch.equal(one.soft[:, 4:], two.soft[:, 4:])
        else:
            assert torch.equal(one.layers[1].keys[:, :, 4:], two.layers[1].keys[:, :, 4:])

    @pytest.mark.parametrize("case", ["icae", "compressor_500x"])
    @torch.no_grad()
    def test_cues_say_different_things(self, case):
        compressor, asked = shared(case, "llama"), words(1, 5, 1)
        assert compressor.cues == ["ae", "continuation"]
        encoded = compressor.compress(words(1, 20))
        ae, on = (compressor.read(encoded, asked, first=0, cue=cue) for cue in compressor.cues)
        assert (ae - on).abs().max() > 1e-3


class Test500x:
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
    @torch.no_grad()
    def test_slots_are_never_in_the_reader_s_future(self, family):
        compressor = shared("compressor_500x", family)
        for tokens in (4, 9, 20):
            encoded = compressor.compress(words(1, tokens))
            assert encoded.layers[0].positions.tolist() == list(range(encoded.slots))
            assert encoded.next_position == encoded.slots
        # In the first layer a slot's key depends on nothing but its embedding and its position.
        encoded = compressor.compress(words(1, 9))
        slots = compressor.modules["slots"](1, torch.float32)
        with compressor.encoding():
            direct = compressor.backbone.run(slots, torch.arange(1, 4)).entries[0]
        torch.testing.assert_close(encoded.layers[0].keys[:, :, 1:], direct.keys, rtol=1e-4, atol=1e-4)

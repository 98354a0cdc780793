"""Nugget: which tokens are kept, and how the scorer learns although choosing has no gradient."""

import pytest
import torch

from longfit.compressors.soft.nugget import best
from tests.soft_models import FAMILIES, bound, shared, words


def test_the_best_are_kept_in_order_with_sinks_and_the_last():
    generator = torch.Generator().manual_seed(0)
    for n, slots, sinks in ((5, 2, 1), (9, 3, 0), (4, 3, 1), (1, 0, 1), (6, 6, 0)):
        scores = torch.randn(3, n, generator=generator)
        for force in (True, False):
            kept = best(scores, slots, sinks, force)
            for row in range(3):
                rest = sorted(range(sinks, n), key=lambda i: -scores[row, i])
                if force and slots:
                    rest.remove(n - 1)
                    rest = [n - 1, *rest]
                assert kept[row].tolist() == list(range(sinks)) + sorted(rest[:slots])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_at_ratio_1_it_is_the_base_model(family):
    compressor, ids, asked = bound("nugget", family, ratio=1), words(2, 20), words(2, 5, 1)
    encoded = compressor.compress(ids)
    assert encoded.slots == 20
    whole = compressor.backbone.model(torch.cat([ids, asked], 1)).logits[:, 20:-1]
    torch.testing.assert_close(compressor.read(encoded, asked), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_changes_nothing_and_has_a_gradient(family):
    compressor, ids, asked = shared("nugget", family), words(2, 20), words(2, 5, 1)
    encoded = compressor.compress(ids)
    bias = compressor.slot_bias(encoded)
    assert bias.shape == (2, encoded.slots) and not bias.any()
    logits = compressor.read(encoded, asked)
    with torch.no_grad():
        plain = compressor.compress(ids)
        assert compressor.slot_bias(plain) is None
        torch.testing.assert_close(compressor.read(plain, asked), logits, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(logits.square().sum(), encoded.scores)
    # The gradient is that of adding the score to the logits of the attention to that token.
    score, by = encoded.scores.detach(), torch.zeros_like(bias)
    with torch.no_grad():
        moved, step = [], 1e-2
        for sign in (1, -1):
            by[1, 3] = sign * step
            compressor.slot_bias = lambda encoded: by.clone()
            moved.append(compressor.read(plain, asked).square().sum())
        del compressor.slot_bias
    assert score.isfinite().all()
    slope = (moved[0] - moved[1]) / (2 * step)
    torch.testing.assert_close(gradient[1, 3], slope, rtol=0.05, atol=0.5)


@torch.no_grad()
def test_rows_choose_their_own_tokens():
    compressor, ids = shared("nugget", "llama"), words(3, 18)
    encoded = compressor.compress(ids)
    assert encoded.layers[0].positions.shape == (3, encoded.slots)
    assert len({tuple(row.tolist()) for row in encoded.layers[0].positions}) > 1
    assert torch.equal(encoded.sources[..., 0], encoded.layers[0].positions)

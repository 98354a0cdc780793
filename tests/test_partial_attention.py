"""Attention by pieces against one softmax over everything, on odd sizes, GQA and low precision."""

import pytest
import torch

from longfit.attention.partial import attend, merge, piece, plain

SHAPES = [(1, 4, 4, 63, 0, 64), (2, 6, 2, 37, 21, 60), (1, 9, 3, 1, 50, 100), (1, 4, 1, 5, 500, 8), (2, 2, 2, 1, 0, 16)]


def reference(q, k, v, stored, scaling):
    """One softmax over stored and chunk keys, in float64."""
    H, Q = q.shape[1:3]
    group = H // k.shape[1]
    keys = torch.cat([stored[0], k], 2) if stored is not None else k
    values = torch.cat([stored[1], v], 2) if stored is not None else v
    keys, values = (t.double().repeat_interleave(group, 1) for t in (keys, values))
    logits = q.double() @ keys.mT * scaling
    n = keys.shape[2] - Q
    hidden = torch.arange(keys.shape[2])[None] > n + torch.arange(Q)[:, None]
    logits = logits.masked_fill(hidden, float("-inf"))
    return logits.softmax(-1) @ values, logits.logsumexp(-1)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "H", "G", "Q", "n", "D"), SHAPES)
def test_pieces_merge_to_the_whole(B, H, G, Q, n, D, dtype, backend) -> None:
    q, k, v = (torch.randn(B, heads, Q, D, dtype=dtype) for heads in (H, G, G))
    stored = tuple(torch.randn(B, G, n, D, dtype=dtype) for _ in range(2)) if n else None
    out, lse = attend(q, k, v, stored, 0.3, backend)
    expected, expected_lse = reference(q, k, v, stored, 0.3)
    error = (out.double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.allclose(lse.double(), expected_lse, atol=1e-4 if dtype == torch.float32 else 5e-2)


def test_keys_and_values_of_different_size() -> None:
    q, k, v = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 24)
    out, _ = attend(q, k, v, None, 0.25, "sdpa")
    assert torch.allclose(out.double(), reference(q, k, v, None, 0.25)[0], atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_kernel_is_the_plain_path(causal: bool) -> None:
    q, k, v = (torch.randn(2, 3, 33, 20) for _ in range(3))
    for given, expected in zip(piece(q, k, v, causal, 0.2, "sdpa"), plain(q, k, v, causal, 0.2), strict=True):
        assert torch.allclose(given, expected, atol=1e-5)


def test_merge_of_an_unlikely_piece_changes_nothing() -> None:
    first, second = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    merged, lse = merge(first, torch.full((1, 1, 3), -200.0), second, torch.zeros(1, 1, 3))
    assert torch.equal(merged, second)
    assert torch.equal(lse, torch.zeros(1, 1, 3))

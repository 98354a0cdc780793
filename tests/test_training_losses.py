"""The losses' arithmetic."""

import pytest
import torch

from longfit.training.losses import cross_entropy, divergence, importance, log_likelihoods
from longfit.training.schedules import learning_rate, linear, stepwise


def logits(seed, T=5, V=11):
    return 3 * torch.randn(2, T, V, generator=torch.Generator().manual_seed(seed))


ONES = torch.ones(2, 5)


def test_divergence_is_that_of_torch_and_zero_between_equals():
    teacher, student = logits(0), logits(1)
    wanted = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    )
    torch.testing.assert_close(divergence(teacher, student, ONES), wanted.sum(-1).mean())
    assert divergence(teacher, teacher, ONES).abs() < 1e-6


def test_top_k_divergence_is_below_the_whole_and_equal_at_all_tokens():
    teacher, student = logits(0), logits(1)
    whole = divergence(teacher, student, ONES)
    parts = [divergence(teacher, student, ONES, top_k=k) for k in (1, 3, 7, 10)]
    assert all(a <= b + 1e-5 for a, b in zip(parts, [*parts[1:], whole], strict=True))
    assert parts[0] > 0
    torch.testing.assert_close(divergence(teacher, student, ONES, top_k=11), whole)
    torch.testing.assert_close(parts[-1], whole, atol=1e-3, rtol=1e-3)


def test_tokens_that_the_context_makes_likelier_weigh_more():
    alone, full = torch.full((1, 3), -4.0), torch.tensor([[-4.0, -1.0, -6.0]])
    found = importance(full, alone, torch.ones(1, 3), gamma=10.0)
    assert found[0, 1] > found[0, 0] > found[0, 2]
    torch.testing.assert_close(found.mean(), torch.tensor(1.0))


def test_importance_is_clipped_and_leaves_out_what_has_no_weight():
    alone = torch.tensor([[-9.0, -9.0, -1.0, -9.0]])
    full = torch.tensor([[-0.1, -3.0, -1.0, 0.0]])
    found = importance(full, alone, torch.tensor([[1.0, 1.0, 1.0, 0.0]]), gamma=2.0)
    assert found[0, 0] == found[0, 1]
    torch.testing.assert_close(found[0, 0] / found[0, 2], torch.tensor(2.0).exp())
    assert found[0, 3] == 0


def test_padding_never_counts_even_where_it_is_no_number():
    given, ids = logits(2), torch.zeros(2, 5, dtype=torch.long)
    weights = ONES.clone()
    weights[1, 3:] = 0
    wanted = -log_likelihoods(given, ids)
    wanted = (wanted * weights).sum() / 8
    given[1, 3:] = float("nan")
    torch.testing.assert_close(cross_entropy(given, ids, weights), wanted)


def test_schedules():
    points = [[0, 1.0], [0.5, 3.0]]
    assert [linear(points, p, "x") for p in (0, 0.25, 0.5, 1)] == [1.0, 2.0, 3.0, 3.0]
    assert [stepwise([[0, 128], [0.5, 256]], p, "x") for p in (0, 0.49, 0.5, 1)] == [128, 128, 256, 256]
    assert learning_rate(0, 0.0, 10, 0.0) == 0.1
    assert learning_rate(9, 0.0, 10, 0.0) == 1.0
    assert learning_rate(99, 1.0, 10, 0.2) == pytest.approx(0.2)

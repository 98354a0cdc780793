"""Where slots stand and what sees what, each against a loop that says it plainly."""

import random
from itertools import pairwise

import pytest
import torch

from longfit.compressors.soft.layout import allowed, group_sizes, pool, random_spans, segment_spans, stride_sizes
from longfit.compressors.soft.places import after_groups, appended, around_groups


def naive_allowed(group, is_slot, scope, keep_raw, mutual, alone):
    T = len(group)
    out = torch.zeros(T, T, dtype=torch.bool)
    for q in range(T):
        for k in range(T):
            same = group[q] == group[k]
            if alone[q]:
                sees = q == k
            elif k > q:
                sees = mutual and bool(same and is_slot[q] and is_slot[k])
            elif not is_slot[q]:
                sees = same or is_slot[k] or group[k] == -1 or keep_raw
            elif scope == "span":
                sees = q == k or (same and not is_slot[k]) or (mutual and same)
            elif scope == "segment":
                sees = same or is_slot[k] or group[k] == -1
            else:
                sees = True
            out[q, k] = bool(sees)
    return out


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("keep_raw", [False, True])
@pytest.mark.parametrize("scope", ["span", "segment", "all"])
def test_masks_are_what_a_loop_says(scope, keep_raw, mutual):
    rng = random.Random(1)
    for T in (1, 2, 7, 19):
        group = torch.tensor(sorted(rng.randint(-1, 3) for _ in range(T)))
        is_slot = torch.tensor([rng.random() < 0.3 and g >= 0 for g in group])
        alone = torch.tensor([rng.random() < 0.2 and not s for s in is_slot])
        seen = allowed(group, is_slot, scope=scope, keep_raw=keep_raw, mutual=mutual, alone=alone)
        assert torch.equal(seen, naive_allowed(group, is_slot, scope, keep_raw, mutual, alone))
        assert seen.diagonal().all()  # a row that sees nothing would be NaN
        none = torch.zeros(T, dtype=torch.bool)
        seen = allowed(group, is_slot, scope=scope, keep_raw=keep_raw, mutual=mutual)
        assert torch.equal(seen, naive_allowed(group, is_slot, scope, keep_raw, mutual, none))


def naive_places(kind, tokens, sinks, ratio, first):
    """The mixed sequence as a list of letters, the kept entries and their sources."""
    text = list(range(tokens))
    groups = [text[i : i + ratio] for i in range(sinks, tokens, ratio)]
    mixed = ["t"] * sinks
    kept, sources = list(range(sinks)), [[first + i, first + i + 1] for i in range(sinks)]
    for group in groups:
        mixed += ["("] * (kind == "around") + ["t"] * len(group)
        if kind != "appended":
            mixed.append(")")
            kept.append(len(mixed) - 1)
            sources.append([first + group[0], first + group[-1] + 1])
    if kind == "appended":
        for _ in groups:
            mixed.append(")")
            kept.append(len(mixed) - 1)
            sources.append([first + sinks, first + tokens])
    return mixed, kept, sources


@pytest.mark.parametrize("kind,lay", [("appended", appended), ("after", after_groups), ("around", around_groups)])
@pytest.mark.parametrize(
    "tokens,sinks,ratio,first", [(1, 1, 3, 0), (2, 2, 3, 0), (9, 1, 4, 0), (8, 0, 4, 20), (7, 0, 1, 5)]
)
def test_places_are_what_a_loop_says(kind, lay, tokens, sinks, ratio, first):
    mixed, kept, sources = naive_places(kind, tokens, sinks, ratio, first)
    places = lay(tokens, sinks, ratio, first)
    assert places.total == len(mixed)
    assert places.tokens.tolist() == [i for i, kind in enumerate(mixed) if kind == "t"]
    assert sorted(places.slots.tolist()) == [i for i, kind in enumerate(mixed) if kind != "t"]
    assert places.kept.tolist() == kept and places.sources.tolist() == sources
    position, positions = first - 1, []
    for entry in mixed:
        position += entry == "t"
        positions.append(max(position, 0))
    assert places.text_positions(first).tolist() == positions
    tokens_mixed = places.mix(torch.ones(1, tokens, 2), 2 * torch.ones(1, len(places.slots), 2))
    assert tokens_mixed[0, :, 0].tolist() == [1.0 if entry == "t" else 2.0 for entry in mixed]


def test_owners_are_the_group_that_closes_next():
    places = around_groups(6, 1, 2)
    assert places.owners(1).tolist() == [-1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_tokens_see_text_alone_in_sliding_layers():
    places = after_groups(4, 0, 2)  # t t ) t t )
    window = places.text_window(torch.ones(6, 6, dtype=torch.bool).tril())
    assert window[3].tolist() == [True, True, False, True, False, False]
    assert window[5].tolist() == [True] * 6


def test_sizes_sum_to_the_tokens():
    for tokens in range(20):
        for ratio in (1, 3, 5):
            near, exact = group_sizes(tokens, ratio), stride_sizes(tokens, ratio)
            assert near.sum() == exact.sum() == tokens and len(near) == len(exact) == -(-tokens // ratio)
            assert near.dtype == exact.dtype == torch.long
            assert not tokens or (near.max() - near.min() <= 1 and (exact[:-1] == ratio).all())


def test_pooling_is_the_mean_of_each_group():
    vectors = torch.randn(2, 7, 3)
    pooled = pool(vectors, torch.tensor([3, 3, 1]))
    wanted = torch.stack([vectors[:, :3].mean(1), vectors[:, 3:6].mean(1), vectors[:, 6]], 1)
    torch.testing.assert_close(pooled, wanted)


def test_random_segments_cover_all_and_hold_their_bounds():
    rng = random.Random(0)
    for _ in range(200):
        spans = random_spans(6144, 4, 2048, rng)
        assert spans[0][0] == 0 and spans[-1][1] == 6144
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert all(1024 <= stop - start <= 2048 or stop == 6144 for start, stop in spans)
        assert max(stop - start for start, stop in spans) <= 2048
    assert segment_spans(0, 4) == [] and segment_spans(9, 4) == [(0, 4), (4, 8), (8, 9)]

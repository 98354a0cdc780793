"""Compressive memory, slots and landmarks against their papers' equations, written down token by token in float64."""

import math

import pytest
import torch

import longfit
from longfit.attention import get
from longfit.attention.approximate.nystrom import add_queries, pseudo_inverse, query_means, stretch_tokens
from longfit.attention.slots import segment_means
from longfit.errors import FingerprintError, InputError
from tests.test_block_sparse import SCALING, scene_of, whole
from tests.tiny import tiny_model

SEGMENT = 8


def turn(vectors: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """A rotary embedding of one frequency: rotates the two halves against each other by `by` [..., S] positions."""
    first, second = vectors.double().chunk(2, -1)
    cos, sin = torch.cos(by * 0.1).unsqueeze(-1), torch.sin(by * 0.1).unsqueeze(-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(vectors.dtype)


def infini_reference(scene, o: dict) -> torch.Tensor:
    """Out [B, H, Q, Dv] of a scene whose stored entries are the whole past: equations 7 to 10, query by query."""
    keys, values = whole(scene)
    n, S = scene.stored, keys.shape[2]
    bare_keys = turn(keys, -torch.arange(S).expand(keys.shape[:3]))
    queries = scene.queries.double()
    bare_queries = turn(queries, -(n + torch.arange(S - n)).expand(queries.shape[:3]))
    feature = lambda t: torch.nn.functional.elu(t) + 1  # noqa: E731
    sinks, size, local = o.get("sink_tokens", 0), o["segment_tokens"], o.get("local_segments", 1)
    out = torch.zeros(*queries.shape[:3], values.shape[-1], dtype=torch.float64)
    for b, h, r in torch.cartesian_prod(*(torch.arange(s) for s in queries.shape[:3])).tolist():
        place = n + r
        low = max(0, (place // size - local + 1) * size)
        seen = [t for t in range(place + 1) if t >= low or t < sinks]
        logits = keys[b, h, seen] @ queries[b, h, r] * SCALING
        exact = logits.softmax(-1) @ values[b, h, seen]
        matrix = torch.zeros(keys.shape[-1], values.shape[-1], dtype=torch.float64)
        normalizer = torch.zeros(keys.shape[-1], dtype=torch.float64)
        for start in range(0, low, size):
            held = [t for t in range(start, start + size) if t >= sinks]
            known = matrix.clone(), normalizer.clone()
            for t in held:
                k, v = feature(bare_keys[b, h, t]), values[b, h, t]
                if o.get("delta_rule", True) and known[1].any():
                    v = v - k @ known[0] / (k @ known[1])
                matrix += torch.outer(k, v)
                normalizer += k
        q = feature(bare_queries[b, h, r])
        if not normalizer.any():
            out[b, h, r] = exact
            continue
        found = q @ matrix / (q @ normalizer)
        share = o.get("memory_share", 0.05)
        if o.get("gate") == "mass":
            share = q @ normalizer / (q @ normalizer + logits.exp().sum())
        out[b, h, r] = share * found + (1 - share) * exact
    return out


def in_chunks(patch, B: int, H: int, G: int, T: int, D: int, chunk: int, dtype=torch.float32, probes: int = 0):
    """The patch over T tokens in chunks, everything stored; the scene of all tokens, outputs and last scene."""
    everything = scene_of(B, H, G, 0, T, D, dtype)
    outs, state, last = [], {}, None
    for start in range(0, T, chunk):
        stop = min(start + chunk, T)
        scene = scene_of(B, H, G, start, stop - start, D, dtype)
        for name in ("queries", "keys", "values"):
            getattr(scene, name).copy_(getattr(everything, name)[:, :, start:stop])
        if start:
            scene.stored_keys.copy_(everything.keys[:, :, :start])
            scene.stored_values.copy_(everything.values[:, :, :start])
        scene.rotate, scene.part.state = turn, state
        scene.probe_tokens = probes if stop == T else 0
        outs.append(patch.attend(scene)[0])
        last = scene
    everything.rotate = turn
    return everything, torch.cat(outs, 2), last


@pytest.mark.parametrize("chunk", [1, 5, 8, 40])
@pytest.mark.parametrize(
    "options",
    [
        {"memory_share": 0.3},
        {"memory_share": 0.3, "delta_rule": False},
        {"gate": "mass"},
        {"memory_share": 0.4, "local_segments": 2, "sink_tokens": 3},
        {"gate": "mass", "local_segments": 3, "sink_tokens": 9},
    ],
)
def test_infini_is_its_equations_however_the_input_is_cut(options, chunk) -> None:
    options = {"segment_tokens": SEGMENT, **options}
    everything, out, _ = in_chunks(get("infini", **options), 2, 4, 2, 37, 6, chunk)
    assert torch.allclose(out.double(), infini_reference(everything, options), atol=1e-4)


def test_infini_in_bfloat16() -> None:
    patch = get("infini", segment_tokens=SEGMENT, memory_share=0.3)
    everything, out, _ = in_chunks(patch, 1, 4, 2, 37, 6, 11, torch.bfloat16)
    expected = infini_reference(everything, {"segment_tokens": SEGMENT, "memory_share": 0.3})
    assert (out.double() - expected).norm() < 0.03 * expected.norm()


def test_what_is_never_stored_is_not_absorbed() -> None:
    patch, state = get("infini", segment_tokens=SEGMENT), []
    for probes in (0, 9):  # 24 or 15 of 24 tokens are stored: three segments leave, or one
        everything, _, last = in_chunks(patch, 1, 2, 1, 24, 6, 24, probes=probes)
        state.append(last.part.state["infini_normalizer"][0, 0])
    bare = turn(everything.keys, -torch.arange(24).expand(1, 1, 24))[0, 0]
    features = torch.nn.functional.elu(bare) + 1
    assert torch.allclose(state[0], features.sum(0), atol=1e-4)
    assert torch.allclose(state[1], features[:SEGMENT].sum(0), atol=1e-4)


def test_a_key_that_memory_cannot_match_brings_nothing_and_no_nan() -> None:
    patch = get("infini", segment_tokens=4, gate="mass")
    scene = scene_of(1, 2, 1, 0, 12, 4, torch.float32)
    scene.keys.fill_(-200.0)  # ELU + 1 underflows
    scene.queries.fill_(-200.0)
    out, lse = patch.attend(scene)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())


def test_infini_holds_a_bounded_cache_and_counts_its_memory() -> None:
    held = []
    for tokens in (100, 300):
        model = longfit.wrap(tiny_model("llama"), attention="infini", segment_tokens=16, chunk_tokens=24)
        ids = torch.randint(3, 100, (1, tokens), generator=torch.Generator().manual_seed(1))
        model.generate(ids, max_new_tokens=8, do_sample=False)
        held.append(model.fit_report.kv_bytes)
    layer = model.longfit.patch.layer_bytes(100, 2, 6, 8, 4)
    assert held[0] == held[1] > 2 * layer
    assert layer == 4 * 2 * 8 * 9


def test_infini_with_packed_positions_reads_the_angles_that_keys_have() -> None:
    ids = torch.randint(3, 100, (1, 90), generator=torch.Generator().manual_seed(1))
    given = []
    for geometry in ("original", "packed"):
        model = longfit.wrap(
            tiny_model("llama"), attention="infini", segment_tokens=16, chunk_tokens=16, geometry=geometry
        )
        given.append(model.generate(ids, max_new_tokens=6, output_logits=True, return_dict_in_generate=True).logits)
    assert torch.allclose(torch.stack(given[0]), torch.stack(given[1]), atol=1e-3)


def test_the_gates_learn() -> None:
    model = longfit.wrap(tiny_model("llama"), attention="infini", segment_tokens=8, chunk_tokens=16)
    patch = model.longfit.patch
    gates = patch.gate_parameters()
    assert gates.shape == (2, 6) and torch.allclose(gates.sigmoid(), torch.tensor(0.05))
    scene = scene_of(1, 6, 2, 0, 24, 8, torch.float32)
    out, _ = patch.attend(scene)
    out.square().sum().backward()
    assert bool((gates.grad[0] != 0).all()) and not bool(gates.grad[1].any())
    before = patch.attend(scene)[0].detach()
    torch.optim.SGD([gates], lr=1.0).step()
    assert not torch.allclose(patch.attend(scene)[0], before)
    with pytest.raises(InputError, match=r"after longfit\.wrap"):
        get("infini").gate_parameters()


@pytest.mark.parametrize("projection", ["mean", "random"])
@pytest.mark.parametrize("shape", [(1, 4, 2, 53, 1, 12), (2, 3, 3, 64, 1, 8)])
def test_linformer_is_attention_to_projected_keys(projection, shape) -> None:
    o = {"slots": 7, "sink_tokens": 2, "recent_tokens": 5, "refresh_tokens": 4, "projection": projection}
    scene = scene_of(*shape, torch.float32)
    out, lse = get("linformer", **o).attend(scene)
    n = scene.stored
    stop = (n - 5) // 4 * 4
    covered = list(range(2, stop))
    exact = [t for t in range(n + 1) if t not in covered]
    if projection == "mean":
        matrix = torch.zeros(7, len(covered), dtype=torch.float64)
        for place in range(len(covered)):
            matrix[place * 7 // len(covered), place] = 1.0
        matrix /= matrix.sum(1, keepdim=True)
    else:
        matrix = torch.randn(7, len(covered), generator=torch.Generator().manual_seed(0)).double() / math.sqrt(7)
    keys, values = whole(scene)
    slot_keys, slot_values = matrix @ keys[:, :, covered], matrix @ values[:, :, covered]
    bias = torch.cat([torch.full((7,), math.log(len(covered) / 7)), torch.zeros(len(exact))]).double()
    logits = scene.queries.double() @ torch.cat([slot_keys, keys[:, :, exact]], 2).mT * SCALING + bias
    expected = logits.softmax(-1) @ torch.cat([slot_values, values[:, :, exact]], 2)
    assert torch.allclose(out.double(), expected, atol=1e-4)
    assert torch.allclose(lse.double(), logits.logsumexp(-1), atol=1e-4)


def test_nystrom_is_the_product_of_its_three_factors() -> None:
    options = {"slots": 8, "sink_tokens": 0, "recent_tokens": 5, "refresh_tokens": 4, "iterations": 6}
    everything, outs, last = in_chunks(decoding(get("nystrom", **options)), 1, 4, 2, 60, 6, 59)
    keys, values = whole(everything)
    queries = everything.queries.double()
    n, stop = 59, 52
    landmarks = torch.stack([queries[:, :, s : min(s + 8, 60)].mean(2) for s in range(0, 60, 8)], 2)
    places = torch.arange(stop) * 8 // stop
    landmark_keys = torch.stack([keys[:, :, :stop][:, :, places == i].mean(2) for i in range(8)], 2)
    one = queries[:, :, n:]
    between = (landmarks @ landmark_keys.mT * SCALING).softmax(-1)
    behind = pseudo_inverse(between.float(), 6).double() @ (
        (landmarks @ keys[:, :, :stop].mT * SCALING).softmax(-1) @ values[:, :, :stop]
    )
    near = one @ landmark_keys.mT * SCALING
    past, past_lse = near.softmax(-1) @ behind, near.logsumexp(-1, keepdim=True) + math.log(stop / 8)
    rest = one @ keys[:, :, stop:].mT * SCALING
    share = (past_lse - torch.logaddexp(past_lse, rest.logsumexp(-1, keepdim=True))).exp()
    expected = share * past + (1 - share) * (rest.softmax(-1) @ values[:, :, stop:])
    assert last.part.index.keys.shape == (1, 2, 8, 6)
    assert torch.allclose(outs[:, :, n:].double(), expected, atol=1e-4)


def decoding(patch):
    """A patch that takes one new token for a decoding step."""
    attend = patch.attend

    def staged(scene):
        scene.phase = "decode" if scene.queries.shape[2] == 1 else "prefill"
        return attend(scene)

    patch.attend = staged
    return patch


def test_the_pseudo_inverse_inverts() -> None:
    torch.manual_seed(0)
    matrix = (torch.eye(9) * 4 + torch.randn(2, 9, 9) * 0.3).softmax(-1)
    assert torch.allclose(pseudo_inverse(matrix, 12) @ matrix, torch.eye(9).expand(2, 9, 9), atol=1e-3)
    wide = matrix[:, :6]
    assert torch.allclose(pseudo_inverse(wide, 20), torch.linalg.pinv(wide), atol=1e-3)


@pytest.mark.parametrize("steps", [[50], [1] * 50, [7, 20, 1, 1, 21], [3, 47]])
def test_query_means_do_not_depend_on_the_chunks(steps) -> None:
    torch.manual_seed(0)
    queries, sums, first = torch.randn(2, 3, 50, 4), None, 0
    for step in steps:
        sums = add_queries(sums, queries[:, :, first : first + step], first, 6)
        first += step
    length = stretch_tokens(50, 6)
    assert length == 16
    expected = torch.stack([queries[:, :, s : s + length].mean(2) for s in range(0, 50, length)], 2)
    assert torch.allclose(query_means(sums, 50, 6), expected, atol=1e-5)


def test_segment_means_of_uneven_stretches() -> None:
    vectors = torch.arange(7.0).view(1, 1, 7, 1)
    assert segment_means(vectors, 3).flatten().tolist() == [1.0, 3.5, 5.5]


@pytest.mark.parametrize("name", ["linformer", "nystrom"])
def test_slots_are_made_anew_only_when_enough_was_stored(name: str) -> None:
    ids = torch.randint(3, 100, (1, 80), generator=torch.Generator().manual_seed(1))
    model = longfit.wrap(
        tiny_model("llama"), attention=name, slots=8, sink_tokens=0, recent_tokens=4, refresh_tokens=16
    )
    made, make = [], type(model.longfit.patch).make

    def counted(scene, keys, values):
        made.append(keys.shape[2])
        return make(model.longfit.patch, scene, keys, values)

    model.longfit.patch.make = counted
    model.generate(ids, max_new_tokens=20, do_sample=False)
    assert made == [64, 64, 80, 80]  # both layers, at 80 stored entries and again at 84


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("infini", {"segment_tokens": 0}, "at least 1"),
        ("infini", {"gate": "tanh"}, "sigmoid"),
        ("infini", {"memory_share": 1.0}, "between 0 and 1"),
        ("linformer", {"projection": "learned"}, "random"),
        ("linformer", {"slots": 0}, "at least 1"),
        ("nystrom", {"iterations": 0}, "at least 1"),
    ],
)
def test_bad_options_are_refused_with_what_would_do(name, options, said) -> None:
    with pytest.raises(InputError, match=said):
        get(name, **options)


def test_a_memory_made_with_other_gates_is_refused() -> None:
    model = longfit.wrap(tiny_model("llama"), attention="infini", segment_tokens=16)
    ids = torch.arange(3, 63)[None]
    memory = model.compress(ids)
    gates = model.longfit.patch.gate_parameters()
    learned = gates.detach().clone()
    with torch.no_grad():
        gates[1, 2] += 0.5
    with pytest.raises(FingerprintError, match="learned weights"):
        model.generate(ids[:, :3], memory=memory, max_new_tokens=2)
    with torch.no_grad():
        gates.copy_(learned)
    model.generate(ids[:, :3], memory=memory, max_new_tokens=2)

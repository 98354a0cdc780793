"""Block-sparse prefill against full softmax under masks written from the papers' definitions."""

import pytest
import torch

import longfit
from longfit.attention import get
from longfit.attention.base import Scene
from longfit.cache.part import Part
from longfit.cache.store import Store
from longfit.errors import InputError
from tests.tiny import tiny_model

SHAPES = [  # B, H, G, n stored, Q new, D
    (1, 4, 4, 0, 63, 16),
    (2, 4, 2, 37, 60, 12),
    (1, 6, 2, 128, 70, 20),
    (1, 4, 1, 5, 150, 8),
    (1, 2, 2, 100, 3, 16),
]
OPTIONS = [
    {"pattern": "a_shape", "sink_tokens": 8, "window_tokens": 24},
    {"pattern": "a_shape", "sink_tokens": 0, "window_tokens": 1},
    {"pattern": "vertical_slash", "vertical_tokens": 40, "slash_tokens": 105},
    {"pattern": "vertical_slash", "vertical_tokens": 7, "slash_tokens": 9},
    {"pattern": "block_topk", "top_blocks": 4, "estimate": "mean"},
    {"pattern": "block_topk", "top_blocks": 4, "estimate": "antidiagonal", "stride": 4},
    {"pattern": "block_topk", "top_blocks": 2, "estimate": "antidiagonal", "stride": 16},
]
BLOCK, SCALING = 16, 0.3


def scene_of(B: int, H: int, G: int, n: int, Q: int, D: int, dtype: torch.dtype, backend: str = "sdpa") -> Scene:
    torch.manual_seed(n + Q)
    queries, keys, values = (torch.randn(B, heads, n + Q, D, dtype=dtype) for heads in (H, G, G))
    store = Store(keys, values, n)
    if n:
        store.append(keys[:, :, :n], values[:, :, :n], torch.arange(n), {}, n)
    return Scene(
        queries=queries[:, :, n:],
        keys=keys[:, :, n:],
        values=values[:, :, n:],
        stored_keys=store.keys if n else None,
        stored_values=store.values if n else None,
        part=Part(slice(0, B), slice(0, G), 0, store),
        first=n,
        first_rotary=n,
        scaling=SCALING,
        backend=backend,
        phase="prefill",
        layer=0,
        layers=1,
    )


def whole(scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values in float64, [B, H, n + Q, D]."""
    pairs = ((scene.stored_keys, scene.keys), (scene.stored_values, scene.values))
    joined = [own if stored is None else torch.cat([stored, own], 2) for stored, own in pairs]
    return tuple(t.double().repeat_interleave(scene.group, 1) for t in joined)


def tops(scores: torch.Tensor, count: int, forced: int) -> set[int]:
    """The first `forced`, and the highest of the others, `count` in all."""
    count = min(count, len(scores))
    first = list(range(min(forced, count)))
    others = sorted((i for i in range(len(scores)) if i not in first), key=lambda i: -float(scores[i]))
    return set(first + others[: count - len(first)])


def visible(scene: Scene, o: dict) -> torch.Tensor:
    """Bool [B, H, Q, n + Q] from the definition of the pattern, query by query."""
    keys, _ = whole(scene)
    queries = scene.queries.double()
    B, H, Q = queries.shape[:3]
    n, S = scene.stored, keys.shape[2]
    seen = torch.zeros(B, H, Q, S, dtype=torch.bool)
    for b, h in ((b, h) for b in range(B) for h in range(H)):
        q, k = queries[b, h], keys[b, h]
        block_rows = {
            i: [r for r in range(Q) if (n + r) // BLOCK == i] for i in range(n // BLOCK, (S - 1) // BLOCK + 1)
        }
        for i, rows in block_rows.items():
            allowed = torch.zeros(S, dtype=torch.bool)
            if o["pattern"] == "a_shape":
                sinks, window = -(-o["sink_tokens"] // BLOCK), -(-o["window_tokens"] // BLOCK)
                for j in range(i + 1):
                    allowed[j * BLOCK : (j + 1) * BLOCK] = j < sinks or i - j < window
            elif o["pattern"] == "vertical_slash":
                last = min(Q, 64)
                weights = torch.zeros(last, S, dtype=torch.float64)
                for r in range(last):
                    place = S - last + r
                    weights[r, : place + 1] = (k[: place + 1] @ q[Q - last + r] * SCALING).softmax(-1)
                diagonals = torch.stack([weights.diagonal(S - last - d).sum() for d in range(S)])
                for column in tops(weights.sum(0), o["vertical_tokens"], 30):
                    allowed[column] = True
                for distance in tops(diagonals, o["slash_tokens"], 100):
                    for place in range(i * BLOCK, (i + 1) * BLOCK):  # the diagonal through the block of the map
                        if place - distance >= 0:
                            j = (place - distance) // BLOCK
                            allowed[j * BLOCK : (j + 1) * BLOCK] = True
            else:
                scores = torch.stack([block_score(q, k, rows, i, j, n, o) for j in range(i)]) if i else torch.zeros(0)
                for j in tops(scores, o["top_blocks"] - 1, 1):
                    allowed[j * BLOCK : (j + 1) * BLOCK] = True
            allowed[i * BLOCK :] = True
            for r in rows:
                seen[b, h, r] = allowed & (torch.arange(S) <= n + r)
    return seen


def block_score(q, k, rows, i, j, n, o) -> torch.Tensor:
    """The estimate for the block of queries i and the earlier block of keys j."""
    if o["estimate"] == "mean":
        return q[rows].mean(0) @ k[j * BLOCK : (j + 1) * BLOCK].mean(0)
    stride, total = o["stride"], torch.tensor(0.0, dtype=torch.float64)
    block = torch.zeros(BLOCK, q.shape[1], dtype=torch.float64)
    block[[n + r - i * BLOCK for r in rows]] = q[rows]
    products = block @ k[: i * BLOCK].T * SCALING / stride
    for row in products.split(stride, 0):
        weights = torch.stack([cell.flip(1).trace() for cell in row.split(stride, 1)]).softmax(-1)
        total = total + weights[j * BLOCK // stride : (j + 1) * BLOCK // stride].sum()
    return total


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_softmax_over_what_the_pattern_shows(shape, options) -> None:
    scene = scene_of(*shape, torch.float32)
    out, lse = get("block_sparse", block_tokens=BLOCK, **options).attend(scene)
    keys, values = whole(scene)
    logits = (scene.queries.double() @ keys.mT * SCALING).masked_fill(~visible(scene, options), float("-inf"))
    assert torch.allclose(out.double(), logits.softmax(-1) @ values, atol=2e-5)
    assert torch.allclose(lse.double(), logits.logsumexp(-1), atol=2e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_in_bfloat16_and_on_the_eager_backend(options) -> None:
    patch = get("block_sparse", block_tokens=BLOCK, **options)
    exact = scene_of(1, 6, 2, 37, 90, 16, torch.float32)
    expected, _ = patch.attend(exact)
    exact.backend = "eager"
    assert torch.allclose(patch.attend(exact)[0], expected, atol=1e-5)
    rough = scene_of(1, 6, 2, 37, 90, 16, torch.bfloat16)
    same = scene_of(1, 6, 2, 37, 90, 16, torch.bfloat16)
    for name in ("queries", "keys", "values", "stored_keys", "stored_values"):
        setattr(same, name, getattr(rough, name).float())
    given, reference = patch.attend(rough)[0], patch.attend(same)[0]
    assert (given.float() - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "a_shape", "window_tokens": 256},
        {"pattern": "vertical_slash", "vertical_tokens": 256},
        {"pattern": "vertical_slash", "vertical_tokens": 1, "slash_tokens": 256},
        {"pattern": "block_topk", "top_blocks": 99, "estimate": "mean"},
        {"pattern": "block_topk", "top_blocks": 99},
    ],
)
def test_keeping_everything_is_full_attention(options) -> None:
    scene = scene_of(2, 6, 2, 37, 90, 16, torch.float32)
    expected, expected_lse = scene.full()
    out, lse = get("block_sparse", block_tokens=16, **options).attend(scene)
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(lse, expected_lse, atol=1e-5)


def test_a_shape_does_not_depend_on_the_chunks_and_decoding_is_full() -> None:
    ids = torch.randint(3, 100, (1, 90), generator=torch.Generator().manual_seed(2))
    options = {"pattern": "a_shape", "block_tokens": 8, "sink_tokens": 8, "window_tokens": 16}
    given = []
    for chunk in (13, 64, 90):
        model = longfit.wrap(tiny_model("llama"), attention=get("block_sparse", **options), chunk_tokens=chunk)
        given.append(model.generate(ids, max_new_tokens=6, output_logits=True, return_dict_in_generate=True))
        assert model.fit_report.kept_tokens == 95
    for other in given[1:]:
        assert torch.allclose(torch.stack(other.logits), torch.stack(given[0].logits), atol=1e-4)


@pytest.mark.parametrize("pattern", ["vertical_slash", "block_topk"])
def test_estimated_patterns_generate_in_chunks_with_padding_and_beams(pattern: str) -> None:
    ids = torch.randint(3, 100, (2, 90), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :16] = 0
    patch = get(
        "block_sparse", pattern=pattern, block_tokens=8, stride=4, slash_tokens=3, vertical_tokens=3, top_blocks=3
    )
    model = longfit.wrap(tiny_model("qwen3"), attention=patch, chunk_tokens=16)
    together = model.generate(ids * mask, attention_mask=mask, max_new_tokens=4, num_beams=2)
    for row, start in ((0, 0), (1, 16)):  # the padding is a whole chunk, so that the chunks are the same
        alone = model.generate(ids[row : row + 1, start:], max_new_tokens=4, num_beams=2)
        assert torch.equal(alone[0, 90 - start :], together[row, 90:])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pattern": "diagonal"}, "a_shape, vertical_slash, block_topk"),
        ({"estimate": "median"}, "antidiagonal"),
        ({"block_tokens": 24, "stride": 16}, "does not divide"),
        ({"top_blocks": 1}, "at least 2"),
        ({"window_tokens": 0}, "at least 1"),
    ],
)
def test_bad_options_are_refused_with_what_would_do(options, said) -> None:
    with pytest.raises(InputError, match=said):
        get("block_sparse", **options)

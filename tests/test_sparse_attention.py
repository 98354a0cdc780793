"""Decode selectors against loops written from their papers, on odd sizes, and their indexes as the store changes."""

import math

import pytest
import torch

import longfit
from longfit.attention import code_scan, get, kernels
from longfit.attention.base import Scene
from longfit.attention.codes import CodeIndex, bucketed
from longfit.attention.hadamard import hadamard, padded_size
from longfit.attention.kernels import cpu, naive
from longfit.cache import Part
from longfit.cache.side_index import pack_bits
from longfit.cache.store import Store
from longfit.errors import InputError
from tests.methods import METHODS
from tests.tiny import tiny_model

PAGE = 5
SELECTORS = {
    "topk": {},
    "quest": {"page_tokens": PAGE},
    "adamas": {"thresholds": (-0.6, 0.1, 0.8)},
    "hadamard_topk": {},
}


class Layer:
    """A store that grows, and scenes of decoding over it."""

    def __init__(self, G: int = 2, group: int = 3, D: int = 12, n: int = 43, dtype=torch.float32, B: int = 2) -> None:
        self.random = torch.Generator().manual_seed(3)
        self.shape, self.group, self.dtype = (B, G, D), group, dtype
        keys, values = self.draw(G, n), self.draw(G, n)
        keys = keys * torch.linspace(0.5, 2, D, dtype=dtype) + torch.linspace(-1, 1, D, dtype=dtype)
        self.store = Store(keys, values, n)
        self.store.append(keys, values, torch.arange(n, dtype=torch.int32), {}, n)
        self.part = Part(slice(0, B), slice(0, G), padding=0, store=self.store)

    def draw(self, heads: int, tokens: int) -> torch.Tensor:
        B, _, D = self.shape
        return torch.randn(B, heads, tokens, D, generator=self.random).to(self.dtype)

    def append(self, tokens: int) -> None:
        n, G = self.store.n, self.shape[1]
        places = torch.arange(n, n + tokens, dtype=torch.int32)
        self.store.append(self.draw(G, tokens), self.draw(G, tokens), places, {}, n + tokens)

    def scene(self) -> Scene:
        (_, G, D), n = self.shape, self.store.n
        own = self.draw(G, 1), self.draw(G, 1)
        query, stored = self.draw(G * self.group, 1), (self.store.keys, self.store.values)
        return Scene(query, *own, *stored, self.part, n, n, D**-0.5, "sdpa", "decode", 5, 9)


def transformed(vector: list[float]) -> list[float]:
    """The Hadamard transform by its recursion, of a vector whose length is a power of two."""
    if len(vector) == 1:
        return vector
    half = len(vector) // 2
    first, second = transformed(vector[:half]), transformed(vector[half:])
    pairs = list(zip(first, second, strict=True))
    return [(a + b) / math.sqrt(2) for a, b in pairs] + [(a - b) / math.sqrt(2) for a, b in pairs]


def padded(vector: torch.Tensor) -> list[float]:
    return transformed(vector.tolist() + [0.0] * (padded_size(len(vector)) - len(vector)))


def code(value: float, edges) -> int:
    return sum(value > edge for edge in edges)


def nearness(query, keys, calibrated: int) -> list[float]:
    """Adamas, section 3: buckets of both, Manhattan distance."""
    edges = SELECTORS["adamas"]["thresholds"]
    asked = [code(x, edges) for x in padded(query)]
    return [-sum(abs(a - code(x, edges)) for a, x in zip(asked, padded(key), strict=True)) for key in keys]


def products(query, keys, calibrated: int) -> list[float]:
    """Ours: the query against the levels of centred and scaled keys."""
    turned, asked = [padded(key) for key in keys], padded(query)
    scores = [0.0] * len(turned)
    for d, q in enumerate(asked):
        seen = torch.tensor([key[d] for key in turned[:calibrated]], dtype=torch.float64)
        mean, deviation = seen.mean().item(), seen.std(correction=0).item()
        for i, key in enumerate(turned):
            level = (-1.5104, -0.4528, 0.4528, 1.5104)[code((key[d] - mean) / deviation, (-0.9816, 0.0, 0.9816))]
            scores[i] += q * deviation * level
    return scores


def exact(query, keys, calibrated: int) -> list[float]:
    return [(query * key).sum().item() for key in keys]


def bounds(query, keys, calibrated: int) -> list[float]:
    """Quest, algorithm 1: for every entry its page's bound."""
    scores = []
    for start in range(0, len(keys), PAGE):
        page = keys[start : start + PAGE]
        low, high = page.min(0).values, page.max(0).values
        bound = sum(max(q * a, q * b) for q, a, b in zip(query.tolist(), low.tolist(), high.tolist(), strict=True))
        scores += [bound] * len(page)
    return scores


REFERENCE = {"topk": exact, "quest": bounds, "adamas": nearness, "hadamard_topk": products}


def check(name: str, scene: Scene, slots: torch.Tensor, k: int, share: str = "head", calibrated: int = 10**6) -> None:
    """The chosen slots are k different ones, and nothing that was left scores higher."""
    queries, keys = scene.queries.double(), scene.stored_keys.double()
    low = scene.queries.dtype == torch.bfloat16
    assert slots.shape == (queries.shape[0], queries.shape[1] if share == "head" else keys.shape[1], k)
    together = 1 if share == "head" else scene.group
    for b in range(slots.shape[0]):
        for head in range(slots.shape[1]):
            asking = range(head * together, (head + 1) * together)
            group = [REFERENCE[name](queries[b, h, 0], keys[b, h // scene.group], calibrated) for h in asking]
            scores = torch.tensor(group).amax(0)
            if name == "quest" and (rest := len(scores) % PAGE):
                scores[-rest:] = torch.inf
            chosen = slots[b, head].sort().values
            assert chosen.unique().numel() == k
            best = scores.sort(descending=True).values[:k]
            # bfloat16 products round what is compared; codes and their levels do not.
            slack = 0.1 if low and name in ("topk", "quest") else 1e-4
            assert torch.allclose(scores[chosen].sort(descending=True).values, best, atol=slack), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("D", "G", "group"), [(12, 2, 3), (64, 1, 2), (8, 3, 1)])
@pytest.mark.parametrize("name", SELECTORS)
def test_the_reference_chooses_the_same(name: str, D: int, G: int, group: int, dtype: torch.dtype) -> None:
    scene = Layer(G, group, D, 43, dtype, B=1).scene()
    check(name, scene, get(name, top_tokens=15, **SELECTORS[name]).choose(scene), 13 if name == "quest" else 15)


@pytest.mark.parametrize("name", SELECTORS)
def test_appended_tokens_are_found_and_statistics_stay_until_the_store_has_doubled(name: str) -> None:
    layer, patch = Layer(n=22, B=1), get(name, top_tokens=15, **SELECTORS[name])
    patch.choose(layer.scene())
    for tokens, calibrated in ((1, 22), (2, 22), (18, 22), (1, 44), (12, 44)):
        layer.append(tokens)
        scene = layer.scene()
        rest = layer.store.n % PAGE
        size = 10 + rest if name == "quest" and rest else 15
        check(name, scene, patch.choose(scene), size, calibrated=calibrated)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_group_chooses_together(name: str) -> None:
    scene = Layer(B=1).scene()
    slots = get(name, top_tokens=15, share="group", **SELECTORS[name]).choose(scene)
    check(name, scene, slots, 13 if name == "quest" else 15, "group")


@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("name", SELECTORS)
def test_attention_is_a_softmax_over_what_was_chosen_and_bytes_are_counted(name: str, share: str) -> None:
    scene, patch = Layer().scene(), get(name, top_tokens=15, share=share, **SELECTORS[name])
    slots = patch.choose(scene)
    scene.read_bytes = 0
    out, lse = patch.attend(scene)
    B, H, G, D = 2, 6, 2, 12
    for b in range(B):
        for h in range(H):
            places = slots[b, h if share == "head" else h // 3]
            keys = torch.cat([scene.stored_keys[b, h // 3, places], scene.keys[b, h // 3]])
            values = torch.cat([scene.stored_values[b, h // 3, places], scene.values[b, h // 3]])
            logits = keys @ scene.queries[b, h, 0] * scene.scaling
            assert torch.allclose(out[b, h, 0], logits.softmax(0) @ values, atol=1e-5)
            assert torch.allclose(lse[b, h, 0], logits.logsumexp(0), atol=1e-5)
    chosen = slots.numel() * 2 * D * 4
    index = {"topk": 43 * D * 4, "quest": 9 * 2 * D * 4, "adamas": 43 * 4, "hadamard_topk": 43 * 4 + 16 * 4}
    assert scene.read_bytes == chosen + B * G * index[name]


@pytest.mark.parametrize("name", ["quest", "adamas", "hadamard_topk"])
def test_with_a_compressor_the_index_describes_what_is_stored(name: str) -> None:
    """Compared at every step, through trims while decoding, with what is made from the store alone."""
    patch = get(name, top_tokens=15, dense_layers=0, **SELECTORS[name])
    estimate, steps = patch.estimate, []

    def checked(scene: Scene) -> torch.Tensor:
        given, index = estimate(scene), scene.part.index
        keys = scene.part.store.keys
        if isinstance(index, CodeIndex):
            assert torch.equal(index.codes.used, pack_bits(bucketed(hadamard(keys), index.edges)))
        else:
            pages = [torch.cat([p.amin(2), p.amax(2)], -1) for p in keys.split(PAGE, 2)]
            assert torch.equal(index.bounds.used, torch.stack(pages, 2))
        steps.append(id(scene.part.store))
        return given

    patch.estimate = checked
    model = longfit.wrap(tiny_model("qwen3"), METHODS["snapkv"](), budget="40 tokens", attention=patch, chunk_tokens=16)
    ids = torch.randint(3, 100, (2, 90), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :23] = 0
    model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert len(set(steps)) > 4
    assert len(steps) == 11 * 2 * 2  # steps, layers, rows that are padded differently


def test_the_transform_keeps_inner_products_and_is_the_recursion() -> None:
    for D in (1, 4, 12, 64, 80):
        a, b = torch.randn(5, D, dtype=torch.float64), torch.randn(7, D, dtype=torch.float64)
        assert torch.allclose(hadamard(a) @ hadamard(b).mT, (a @ b.mT).float(), atol=1e-4)
        assert torch.allclose(hadamard(a)[0], torch.tensor(padded(a[0])), atol=1e-5)


def test_calibrated_adamas_spreads_keys_over_all_codes_where_the_published_edges_do_not() -> None:
    layer = Layer(G=1, group=1, D=64, n=300, B=1)
    counts = {}
    for thresholds in ("fixed", "calibrated"):
        layer.part.index = None
        patch = get("adamas", top_tokens=20, thresholds=thresholds)
        patch.choose(layer.scene())
        codes = bucketed(hadamard(layer.store.keys), layer.part.index.edges)
        counts[thresholds] = torch.bincount(codes.flatten().int(), minlength=4) / codes.numel()
    assert counts["fixed"][[0, 3]].sum() < 0.01
    assert (counts["calibrated"] - 0.25).abs().max() < 0.01


def test_sinks_and_recent_tokens_are_among_the_chosen() -> None:
    scene = Layer(B=1).scene()
    for name, options in SELECTORS.items():
        slots = get(name, top_tokens=30, sink_tokens=2, recent_tokens=7, **options).choose(scene)
        for wanted in (0, 1, 36, 42):
            assert (slots == wanted).any(-1).all(), name


@pytest.mark.parametrize(
    ("name", "options", "remedy"),
    [
        ("quest", {"top_tokens": 100, "page_tokens": 16}, "top_tokens=96 or 112 would do"),
        ("quest", {"top_tokens": 10, "page_tokens": 16}, "top_tokens=16 would do"),
        ("quest", {"page_tokens": 0}, "page_tokens"),
        ("quest", {"top_tokens": 48, "sink_tokens": 17, "recent_tokens": 17}, "raise top_tokens"),
        ("adamas", {"thresholds": "learned"}, "calibrated"),
        ("adamas", {"thresholds": (1.0, 0.0, 2.0)}, "ascending"),
        ("hadamard_topk", {"top_tokens": 0}, "top_tokens"),
    ],
)
def test_bad_options_name_the_remedy(name: str, options: dict, remedy: str) -> None:
    with pytest.raises(InputError, match=remedy):
        get(name, **options)


def test_quest_reads_three_pages_at_least() -> None:
    patch = get("quest", top_tokens=PAGE, page_tokens=PAGE)
    assert patch.choose(Layer(n=40).scene()).shape[-1] == 3 * PAGE


@pytest.mark.parametrize("shape", [(1, 3, 3, 129, 16), (2, 1, 9, 64, 32), (1, 2, 1, 7, 64), (1, 1, 6, 700, 4)])
def test_scans_compiled_and_in_plain_torch_are_the_reference(shape: tuple[int, ...]) -> None:
    B, G, R, n, W = shape
    stored = torch.randint(0, 256, (B, G, n + 50, W), dtype=torch.uint8)[:, :, :n]
    queries, levels = torch.randn(B, G, R, 4 * W), (-1.5, -0.5, 0.4, 1.6)
    asked = torch.randint(0, 256, (B, G, R, W), dtype=torch.uint8)
    for way in (kernels, code_scan):
        given = way.code_products(queries, stored, levels)
        assert torch.allclose(given, naive.code_products(queries, stored, levels), atol=1e-4)
        assert torch.equal(way.code_nearness(asked, stored), naive.code_nearness(asked, stored))


@pytest.mark.parametrize("n", [1, 63, 3000, 20000])
@pytest.mark.parametrize("kind", ["random", "ties", "rising", "infinite"])
def test_the_compiled_choice_is_the_first_of_the_highest(kind: str, n: int) -> None:
    scores = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(n))
    if kind == "ties":
        scores = scores.round()
    elif kind == "rising":
        scores = torch.arange(n).float().expand(2, 3, n)
    elif kind == "infinite":
        scores[..., : n // 3], scores[..., n // 2 :] = torch.inf, -torch.inf
    for k in {1, n, n // 2 or 1, min(n, 128)}:
        slots = kernels.select_top(scores, k)
        assert torch.equal(scores.gather(-1, slots).sort(-1).values, scores.topk(k).values.sort(-1).values)
        if cpu.selects(scores):
            assert torch.equal(slots.int(), naive.select_top(scores, k))


def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("LONGFIT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    cpu._library.cache_clear()
    try:
        scene = Layer(D=64).scene()
        for _ in range(2):
            get("hadamard_topk", top_tokens=15).attend(scene)
        assert [record.levelname for record in caplog.records if "C compiler" in record.message] == ["WARNING"]
    finally:
        cpu._library.cache_clear()


def test_plain_torch_can_be_asked_for(monkeypatch) -> None:
    monkeypatch.setenv("LONGFIT_KERNELS", "plain")
    monkeypatch.setattr(cpu, "_library", lambda: pytest.fail("compiled code was looked for"))
    get("hadamard_topk", top_tokens=15).attend(Layer(D=64).scene())

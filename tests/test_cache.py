"""The parts of the cache: storage, rotary moves, what a compressor sees."""

import pytest
import torch

import longfit
from longfit.cache import Rotary, Store
from longfit.cache.store import take
from longfit.cache.trim import oldest_first
from longfit.chunks import chunk_spans
from longfit.errors import UnsupportedFeatureError
from longfit.padding import left_padding
from tests.tiny import FAMILIES, tiny_model


def filled(n: int, capacity: int) -> Store:
    keys, values = torch.randn(2, 3, n, 5), torch.randn(2, 3, n, 7)
    store = Store(keys, values, capacity, ("mass",))
    store.append(keys, values, torch.arange(n, dtype=torch.int32), {"mass": 1.5}, limit=capacity)
    return store


def test_store_fills_in_place_and_grows_in_steps() -> None:
    store = filled(4, 10)
    before = store._keys.data_ptr()
    store.append(*(torch.randn(2, 3, 6, d) for d in (5, 7)), torch.arange(4, 10, dtype=torch.int32), {}, limit=10)
    assert store._keys.data_ptr() == before
    assert (store.n, store.capacity) == (10, 10)
    keys = store.keys.clone()
    store.append(*(torch.randn(2, 3, 1, d) for d in (5, 7)), torch.tensor([10], dtype=torch.int32), {}, limit=1000)
    assert store.capacity == 11 + 256
    assert torch.equal(store.keys[:, :, :10], keys)
    assert store.scores["mass"][0, 0].tolist() == [1.5] * 4 + [0.0] * 7


def test_store_selects_rows_and_entries() -> None:
    store = filled(9, 12)
    indices = torch.stack([torch.randperm(9)[:4].sort().values for _ in range(6)]).view(2, 3, 4)
    chosen = store.selected(indices, capacity=5)
    assert (chosen.n, chosen.capacity) == (4, 5)
    expected = store.keys.gather(2, indices[..., None].expand(-1, -1, -1, 5))
    assert torch.equal(chosen.keys, expected)
    assert torch.equal(chosen.positions.long(), indices)
    assert torch.equal(store.rows(torch.tensor([1, 1, 0])).values, store.values[[1, 1, 0]])


def test_nbytes_is_what_is_allocated() -> None:
    assert filled(4, 10).nbytes == 2 * 3 * 10 * ((5 + 7) * 4 + 4 + 4)


def test_take_is_gather() -> None:
    entries = torch.randn(2, 3, 11, 4)
    indices = torch.randint(0, 11, (2, 3, 6))
    assert torch.equal(take(entries, indices), entries.gather(2, indices[..., None].expand(-1, -1, -1, 4)))


def test_take_reads_the_used_part_of_a_buffer_where_it_lies() -> None:
    buffer, indices = torch.randn(2, 3, 20, 4), torch.randint(0, 11, (2, 3, 6))
    wanted = indices[..., None].expand(-1, -1, -1, 4)
    views = [buffer[:, :, :11], buffer[:, :, 7:18], buffer.flip(0)[:, :, :11], buffer.transpose(0, 1)[:2, :2, :11]]
    for view in [*views, buffer[:, :1].expand(-1, 3, -1, -1), buffer[..., ::2]]:
        at = indices[: view.shape[0], : view.shape[1]]
        assert torch.equal(take(view, at), view.gather(2, at[..., None].expand(-1, -1, -1, view.shape[3])))
    buffer[:, :, 11:] = torch.nan
    assert torch.equal(take(buffer[:, :, :11], indices), buffer[:, :, :11].gather(2, wanted))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_there_and_back(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family)
    rotary = Rotary.of(model.get_decoder())
    keys = torch.randn(2, 3, 17, getattr(model.config, "head_dim", None) or 8).to(dtype)
    by = torch.randint(0, 300, (2, 3, 17))
    moved = rotary.rotate(keys, by)
    assert moved.dtype == dtype
    assert not torch.allclose(moved.float(), keys.float(), atol=0.1)
    back = rotary.rotate(moved, -by)
    assert torch.allclose(back.float(), keys.float(), atol=1e-4 if dtype == torch.float32 else 4e-2)
    twice = rotary.rotate(rotary.rotate(keys.float(), by), by * 2)
    assert torch.allclose(twice, rotary.rotate(keys.float(), by * 3), atol=1e-3)


def test_what_may_not_be_dropped_yields_by_age() -> None:
    scores = torch.tensor([[[3.0, float("inf"), 9.0, float("inf")]]])
    ranked = oldest_first(scores, torch.tensor([[[0, 1, 2, 3]]]))
    assert ranked.argsort(-1, descending=True)[0, 0].tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (4, 4), (5, 4), (17, 5), (3, 100)])
def test_chunks_are_counted_from_the_end(tokens: int, chunk: int) -> None:
    spans = chunk_spans(tokens, chunk)
    assert [stop for _, stop in spans][-1] == tokens
    assert all(stop - start == chunk for start, stop in spans[1:])
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]


def test_left_padding_is_counted() -> None:
    assert left_padding(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])) == [2, 0]


def test_a_cache_that_dropped_entries_cannot_be_rolled_back() -> None:
    model = longfit.wrap(tiny_model("llama"), "knorm", budget="10 tokens", chunk_tokens=8)
    cache = model(torch.randint(3, 100, (1, 30)), use_cache=True).past_key_values
    with pytest.raises(UnsupportedFeatureError, match="rolled back"):
        cache.crop(-1)
    assert cache.get_seq_length() == 30
    copy = cache.fork()
    model(torch.randint(3, 100, (1, 1)), past_key_values=copy, use_cache=True)
    assert (cache.seen, copy.seen) == (30, 31)
    cache.reorder_cache(torch.tensor([0, 0]))
    assert cache.bounded[0].kept_by_head() == [[10, 10], [10, 10]]


@pytest.mark.parametrize("geometry", ["original", "packed"])
def test_hybrid_models_follow_in_both_geometries(geometry: str) -> None:
    model = tiny_model("gemma3_text")
    ids = torch.randint(3, 100, (1, 70))
    wrapped = longfit.wrap(model, "streaming_llm", budget="100%", chunk_tokens=16, geometry=geometry)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    given = wrapped.generate(ids, **how)
    with wrapped.disabled():
        assert torch.equal(given, wrapped.generate(ids, **how))
    small = longfit.wrap(model, "streaming_llm", budget="20 tokens", chunk_tokens=16, geometry=geometry)
    small.generate(ids, **how)
    layer = small(ids, use_cache=True).past_key_values.own_layers[0]
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes, "the window keeps the chunk's storage alive"


@pytest.mark.parametrize(("stored", "new", "probes"), [(0, 300, 0), (40, 300, 0), (40, 200, 130), (7, 1, 0)])
def test_column_mass_is_the_sum_of_the_attention_matrix(stored: int, new: int, probes: int) -> None:
    from longfit.cache import View

    torch.manual_seed(0)
    B, G, H, D = 2, 2, 4, 8
    S, Q = stored + new, new + probes
    keys, own = torch.randn(B, G, S, D), torch.randn(B, G, probes, D)
    queries = torch.randn(B, H, Q, D)
    everything = torch.cat([keys, own], 2).repeat_interleave(H // G, 1)
    logits = queries @ everything.mT * 0.3
    later = torch.arange(S + probes)[None] > stored + torch.arange(Q)[:, None]
    logits.masked_fill_(later, float("-inf"))
    view = View(
        keys=keys,
        values=keys,
        positions=torch.arange(S).expand(B, G, S),
        new=new,
        queries=None,
        query_positions=None,
        scaling=0.3,
        n_keep=0,
        seen=S,
        next_position=S,
        layer=0,
        layers=1,
        phase="prefill",
        all_queries=queries,
        log_sum_exp=logits.logsumexp(-1),
    )
    expected = logits.softmax(-1)[..., :S].sum(2).view(B, G, H // G, S)
    torch.testing.assert_close(view.column_mass(), expected)

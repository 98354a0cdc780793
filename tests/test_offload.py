"""The slow tier: what leaves the fast side, what is brought back, what it costs, and how it can fail."""

import copy
import gc
import itertools
import json
import resource
from pathlib import Path

import pytest
import torch

import longfit
from longfit.attention import get
from longfit.attention.spans import band, span_starts, triangle_scores
from longfit.cache import SlowTier, Store
from longfit.cache.slow_file import SlowFile
from longfit.errors import BudgetError, InputError, MemoryFileError, OffloadError, UnsupportedModelError
from longfit.memory_pages import PageFile
from tests.patches import NARROW, SLOW, narrow
from tests.test_attention import generated, prompt
from tests.tiny import tiny_model

RETRIEVING = ["infllm", "ltri", "offloaded"]
INDEX_BYTES = 2 * (400 // 8 + 256) * 2 * 2 * 8 * 4  # two layers and heads, at most two vectors of 8 numbers a page
ALL_BACK = {"sink_tokens": 3, "window_tokens": 9, "block_tokens": 4, "top_blocks": 99, "cached_blocks": 99}


def offloaded_files(folder: Path) -> list[str]:
    """Targets of this process's open files below a folder."""
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [str(target) for target in links if str(target).startswith(str(folder))]


# -- what is brought back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_where_every_page_comes_back_it_is_full_attention(family: str) -> None:
    model, ids = tiny_model(family), prompt(2, 70)
    expected = generated(model, ids)
    fitted = longfit.wrap(model, attention="offloaded", chunk_tokens=16, query_tokens=5, **ALL_BACK)
    given = generated(fitted, ids)
    assert torch.equal(given.sequences, expected.sequences)
    spread = expected.logits[0].std()
    for ours, theirs in zip(given.logits, expected.logits, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * spread
    report = fitted.fit_report
    assert report.offloaded_bytes > 0.5 * report.full_kv_bytes * (1 if family != "gemma3_text" else 0.5)
    assert report.page_hits > 0


def test_beams_over_a_slow_tier_are_the_models_own() -> None:
    model, ids = tiny_model("llama"), prompt(2, 50)
    how = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    expected = model.generate(ids, **how)
    fitted = longfit.wrap(model, attention="offloaded", chunk_tokens=16, **ALL_BACK)
    assert torch.equal(fitted.generate(ids, **how), expected)


@pytest.mark.parametrize("name", RETRIEVING)
def test_rows_of_a_batch_are_the_rows_alone(name: str) -> None:
    fitted, ids = longfit.wrap(tiny_model("llama"), attention=narrow(name), chunk_tokens=16), prompt(2, 60)
    together = generated(fitted, ids).sequences
    for row in range(2):
        assert torch.equal(generated(fitted, ids[row : row + 1]).sequences[0], together[row])


@pytest.mark.parametrize("name", RETRIEVING)
def test_beside_a_compressor_what_it_drops_is_offloaded(name: str) -> None:
    fitted = longfit.wrap(tiny_model("llama"), "streaming_llm", budget="36 tokens", attention=narrow(name))
    generated(fitted, prompt(1, 90))
    report = fitted.fit_report
    assert report.kept_tokens <= 36
    assert report.offloaded_bytes + 0.4 * report.full_kv_bytes > 0.8 * report.full_kv_bytes


@pytest.mark.parametrize("name", ["infllm", "ltri"])
def test_past_the_models_window_positions_stay_and_the_fast_side_does_not_grow(name: str) -> None:
    fitted = longfit.wrap(tiny_model("llama", max_position_embeddings=64), attention=narrow(name), chunk_tokens=16)
    kept = []
    for tokens in (80, 200):
        logits = generated(fitted, prompt(1, tokens), max_new_tokens=3).logits
        assert torch.stack(logits).isfinite().all()
        assert fitted.fit_report.geometry == "original"
        kept.append(fitted.fit_report.kept_tokens)
    assert kept[1] <= kept[0] + SLOW["block_tokens"]


# -- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RETRIEVING)
@pytest.mark.parametrize("budget", ["1 MiB", "148 tokens"])
def test_the_budget_counts_the_fast_side_and_holds_at_every_step(name: str, budget: str) -> None:
    options = {"sink_tokens": 4, "window_tokens": 40, "block_tokens": 8, "top_blocks": 3, "cached_blocks": 11}
    fitted = longfit.wrap(tiny_model("llama"), attention=get(name, **options), budget=budget, chunk_tokens=32)
    ids = prompt(1, 400)
    cache = None
    for step in range(12):
        tokens = ids if step == 0 else ids[:, step : step + 1]
        outputs = fitted(tokens, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        assert cache.nbytes <= (2**20 if "MiB" in budget else 148 * 2 * 2 * (2 * 8 * 4 + 4 + 8) + INDEX_BYTES)
        assert cache.kept_tokens <= 148
    assert cache.offloaded_bytes > 0.8 * fitted.longfit.shape.full_kv_bytes(400)


def test_a_fast_side_without_room_for_the_pages_is_refused() -> None:
    fitted = longfit.wrap(tiny_model("llama"), attention=narrow("infllm"), budget="16 tokens", chunk_tokens=16)
    with pytest.raises(BudgetError, match="brought in"):
        generated(fitted, prompt(1, 90))


def test_the_page_used_longest_ago_makes_room() -> None:
    keys, values = torch.randn(1, 2, 20, 3), torch.randn(1, 2, 20, 5)
    entries = Store(keys, values, 20)
    entries.append(keys, values, torch.arange(20, dtype=torch.int32), {}, 20)
    tier = SlowTier(SlowFile(), page_tokens=4, slots=3)
    tier.receive(entries)
    for start in range(0, 16, 4):
        tier.put_away(slice(start, start + 4), torch.zeros(1, 2, 3))
    tier.put_away(slice(16, 18), torch.zeros(1, 2, 3))
    tier.forget(18)
    assert (tier.tail.n, tier.pages) == (2, 5)
    for asked in ([0, 1], [2, 0], [3, 0], [0, 2]):  # 1 makes room for 3: 0 was asked for again
        tier.ask([asked, asked])
    assert (tier.hits, tier.reads) == (2 * 4, 2 * 4)
    tier.ask([[4, 0], [3, 1]])
    found, values_found, filled = tier.brought([[4, 0], [3, 1]])
    assert torch.equal(found[0, 0, :2], keys[0, 0, 16:18])
    assert torch.equal(values_found[0, 1], torch.cat([values[0, 1, 12:16], values[0, 1, 4:8]]))
    assert filled.tolist() == [[[True, True, False, False, *[True] * 4], [True] * 8]]


# -- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RETRIEVING)
def test_forks_share_the_pages_and_write_their_own(name: str) -> None:
    fitted = longfit.wrap(tiny_model("llama"), attention=narrow(name), chunk_tokens=16)
    memory = fitted.compress(prompt(1, 64))
    before, question = memory.cache.offloaded_bytes, prompt(1, 30)
    first, other = memory.fork(memory.fingerprint), memory.fork(memory.fingerprint)
    answers = []
    for cache in (first, other):
        logits = fitted(question, past_key_values=cache, use_cache=True).logits
        answers.append(logits)
    assert torch.equal(*answers)
    assert memory.cache.offloaded_bytes == before < first.offloaded_bytes
    ours, theirs = (cache.bounded[0].parts[0].tier for cache in (memory.cache, first))
    assert theirs.places[: ours.pages] == ours.places
    assert theirs.places[-1][0] is not ours.places[0][0]
    twin = copy.deepcopy(first)
    again = fitted(question[:, :1], past_key_values=twin, use_cache=True).logits
    assert torch.equal(again, fitted(question[:, :1], past_key_values=other, use_cache=True).logits)


# -- saving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RETRIEVING)
def test_a_saved_memory_answers_as_fresh_and_reads_its_pages_where_they_lie(name: str, tmp_path: Path) -> None:
    fitted = longfit.wrap(tiny_model("llama"), attention=narrow(name), chunk_tokens=16)
    memory, question = fitted.compress(prompt(2, 64)), prompt(2, 30)
    memory.save(tmp_path / "saved")
    loaded = longfit.Memory.load(tmp_path / "saved", fitted)
    assert loaded.cache.offloaded_bytes == memory.cache.offloaded_bytes > 0
    assert loaded.tokens_in == memory.tokens_in
    assert loaded.kept_tokens < memory.kept_tokens  # no page has been brought in yet
    answers = [
        fitted.generate(question, memory=given, max_new_tokens=20, do_sample=False)
        for given in (memory, loaded, loaded, memory)
    ]
    assert all(torch.equal(answers[0], other) for other in answers)
    (pages,) = (tmp_path / "saved").glob("pages-*.bin")
    assert pages.stat().st_size == memory.cache.offloaded_bytes
    assert str(pages) in offloaded_files(tmp_path)
    loaded.save(tmp_path / "saved")  # over the file that it reads
    (again,) = (tmp_path / "saved").glob("pages-*.bin")
    assert again != pages
    reloaded = longfit.Memory.load(tmp_path / "saved", fitted)
    given = fitted.generate(question, memory=reloaded, max_new_tokens=20, do_sample=False)
    assert torch.equal(given, answers[0])


def test_pages_that_were_changed_or_lie_outside_their_file_are_refused(tmp_path: Path) -> None:
    fitted = longfit.wrap(tiny_model("llama"), attention=narrow("infllm"), chunk_tokens=16)
    folder = fitted.compress(prompt(1, 64)).save(tmp_path / "saved")
    (pages,) = folder.glob("pages-*.bin")
    whole, context = pages.read_bytes(), (folder / "context.json").read_text()
    for name, change in {
        "a place past the end": lambda tier: tier["places"].__setitem__(-1, len(whole)),
        "a page longer than pages are": lambda tier: tier["lengths"].__setitem__(0, 10**6),
        "a page that is not there": lambda tier: tier["recent"].append(10**6),
        "fewer pages than index vectors": lambda tier: [tier[key].pop() for key in ("places", "lengths")],
    }.items():
        facts = json.loads(context)
        change(facts["cache"]["layers"][0]["parts"][0]["tier"])
        (folder / "context.json").write_text(json.dumps(facts))
        with pytest.raises(MemoryFileError, match="pages of a slow tier"):
            longfit.Memory.load(folder, fitted)
            pytest.fail(name)
    (folder / "context.json").write_text(json.dumps({**json.loads(context), "pages": "../../etc/passwd"}))
    with pytest.raises(MemoryFileError, match="not a file that longfit writes"):
        longfit.Memory.load(folder, fitted)
    (folder / "context.json").write_text(context)
    pages.write_bytes(whole[:-1])
    with pytest.raises(MemoryFileError, match="changed or cut off"):
        longfit.Memory.load(folder, fitted)
    pages.unlink()
    with pytest.raises(MemoryFileError, match="cannot be read"):
        longfit.Memory.load(folder, fitted)


def test_a_full_disk_while_saving_leaves_the_old_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = longfit.wrap(tiny_model("llama"), attention=narrow("infllm"), chunk_tokens=16)
    memory = fitted.compress(prompt(1, 64))
    folder = memory.save(tmp_path / "saved")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    written = PageFile.write

    def full(self: PageFile, page: torch.Tensor) -> int:
        if self.nbytes > 2000:
            raise OSError(28, "No space left on device")
        return written(self, page)

    monkeypatch.setattr(PageFile, "write", full)
    with pytest.raises(OSError, match="No space"):
        memory.save(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# -- files and bad input -------------------------------------------------------------------------------------------


def test_the_file_has_no_name_and_goes_with_the_last_copy(tmp_path: Path) -> None:
    fitted = longfit.wrap(tiny_model("llama"), attention=get("infllm", **NARROW["infllm"], folder=str(tmp_path)))
    memory = fitted.compress(prompt(1, 64))
    fork = memory.fork(memory.fingerprint)
    assert not list(tmp_path.iterdir())
    assert len(offloaded_files(tmp_path)) == 1
    del memory
    gc.collect()
    assert len(offloaded_files(tmp_path)) == 1
    del fork
    gc.collect()
    assert not offloaded_files(tmp_path)


def test_what_was_read_of_the_file_is_not_resident_memory(tmp_path: Path) -> None:
    def resident_file_bytes() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1]) * 1024

    shelf, pages = SlowFile(str(tmp_path)), torch.randn(64, 2**17)  # 32 MiB
    places = [shelf.write(page) for page in pages]
    found, before = torch.empty(2**17), resident_file_bytes()
    for page, place in zip(pages, places, strict=True):
        shelf.read(place, 0, found)
        shelf.wait()
        assert torch.equal(found, page)
    assert resident_file_bytes() - before < 2**21


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    patch = get("offloaded", **SLOW, folder=str(tmp_path / "nowhere"))
    with pytest.raises(OffloadError, match="nowhere"):
        generated(longfit.wrap(tiny_model("llama"), attention=patch, chunk_tokens=16), prompt())


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    fitted = longfit.wrap(tiny_model("llama"), attention=get("offloaded", **SLOW, folder=str(tmp_path)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OffloadError, match="folder with room"):
            generated(fitted, prompt(1, 200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", RETRIEVING)
def test_options_are_checked(name: str) -> None:
    with pytest.raises(InputError, match="cached_blocks"):
        get(name, top_blocks=50)
    for option in ("window_tokens", "block_tokens", "top_blocks", "query_tokens"):
        with pytest.raises(InputError, match=option):
            get(name, **{option: 0})


def test_a_window_beyond_the_models_own_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="window_tokens"):
        longfit.wrap(tiny_model("llama"), attention="infllm")


# -- triangles -----------------------------------------------------------------------------------------------------


def causal_map(H: int, G: int, Q: int, D: int) -> tuple[torch.Tensor, ...]:
    """Random queries, keys, their log-sum-exp, and the attention averaged over heads [Q, Q]."""
    queries, keys = torch.randn(1, H, Q, D), torch.randn(1, G, Q, D)
    logits = queries @ keys.repeat_interleave(H // G, 1).mT * 0.4
    logits = logits.masked_fill(torch.ones(Q, Q).triu(1).bool(), float("-inf"))
    return queries, keys, logits.logsumexp(-1), logits.softmax(-1)[0].mean(0)


@pytest.mark.parametrize(("H", "G", "Q", "width"), [(4, 2, 77, 32), (3, 1, 130, 16), (2, 2, 9, 24)])
def test_the_band_holds_the_diagonals_of_the_map(H: int, G: int, Q: int, width: int) -> None:
    queries, keys, lse, attention = causal_map(H, G, Q, 8)
    given = band(queries, keys, lse, 0.4, width)
    for d in range(min(width, Q)):
        assert torch.allclose(given[d:, d], attention.diagonal(-d), atol=1e-5)
        assert not given[:d, d].any()


def test_triangles_are_summed_as_drawn() -> None:
    queries, keys, lse, attention = causal_map(4, 2, 40, 8)
    given = triangle_scores(band(queries, keys, lse, 0.4, 16), 8)
    for start in range(33):
        rows = attention[start : start + 8]
        inside = sum(rows[a, start + b] for a in range(8) for b in range(a + 1))
        before = sum(rows[a, c] for a in range(8) for c in range(max(0, start - 8), start))
        assert abs(given[start] - (inside - before) / 8) < 1e-5


def test_blocks_that_look_at_themselves_are_the_spans() -> None:
    edges = [0, 16, 48, 64, 80, 90]
    attention = torch.full((90, 90), 1e-4)
    for start, stop in itertools.pairwise(edges):
        attention[start:stop, start:stop] = 1.0 / (stop - start)
    attention = attention.tril()
    banded = torch.zeros(90, 64)
    for d in range(64):
        banded[d:, d] = attention.diagonal(-d)
    assert span_starts(banded, shortest=16, longest=32) == edges[:-1]

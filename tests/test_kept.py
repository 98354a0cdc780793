"""What was kept: the fraction of layers and heads that hold each token, from a memory and from its folder."""

import base64
import json
import zlib

import numpy as np
import pytest
import torch

import longfit
from longfit.docqa.document import Document, Page
from longfit.docqa.kept import OUTSIDE, Kept, kept, kept_on_disk, no_text, spans_of
from longfit.docqa.kept_picture import picture
from longfit.docqa.source import Source
from longfit.errors import InputError, MemoryFileError, UnsupportedFeatureError
from tests.methods import METHODS
from tests.test_learned_wrapper import CASES, learned, prompt
from tests.test_prompt_wrapper import CONTEXT, bpe_tokenizer, prompt_model
from tests.tiny import tiny_model

TOKENS = 70


def by_hand(memory, row=0):
    """[L, T] by looking up every token in every head."""
    heads = memory.cache.bounded[0].kept_by_head()[row]
    shares = np.zeros((len(memory.cache.bounded), TOKENS))
    for share, layer in zip(shares, memory.cache.bounded, strict=True):
        for part in layer.parts:
            if part.rows.start <= row < part.rows.stop:
                for head in part.store.positions[row - part.rows.start]:
                    for place in head.tolist():
                        share[place] += 1 / len(heads)
    return shares


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_which_tokens_stayed(name, family, tmp_path):
    model = longfit.wrap(tiny_model(family), METHODS[name](), budget="24 tokens")
    memory = model.compress(prompt(2, TOKENS))
    memory.save(tmp_path / "m")
    for row in (0, 1):
        found = kept(memory, no_text(TOKENS), row)
        assert np.allclose(found.shares, by_hand(memory, row), atol=1e-5)
        assert np.array_equal(kept_on_disk(tmp_path / "m", no_text(TOKENS), row).shares, found.shares)
    assert found.layers == ((1, 2) if family == "gemma3_text" else (0, 1))
    means = [kept(memory, no_text(TOKENS), row).share.sum() for row in (0, 1)]
    assert np.mean(means) == pytest.approx(memory.kept_tokens, abs=1e-3)


def test_packed_positions_keep_where_an_entry_came_from():
    model = longfit.wrap(tiny_model("llama"), "streaming_llm", budget="24 tokens", geometry="packed")
    share = kept(model.compress(prompt(1, TOKENS)), no_text(TOKENS)).share
    assert share[:4].tolist() == [1] * 4 and share[-20:].tolist() == [1] * 20 and not share[4:-20].any()


def test_a_padded_row_counts_its_own_tokens(tmp_path):
    model = longfit.wrap(tiny_model("llama"), METHODS["snapkv"](), budget="20 tokens")
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :9] = 0
    memory = model.compress(prompt(2, TOKENS), mask)
    memory.save(tmp_path / "m")
    for row, tokens in ((0, TOKENS - 9), (1, TOKENS)):
        found = kept(memory, no_text(tokens), row)
        assert found.share.sum() == pytest.approx(20, abs=1e-3) and found.share[-1] == 1
        assert np.array_equal(kept_on_disk(tmp_path / "m", no_text(tokens), row).shares, found.shares)


@pytest.mark.parametrize("name", CASES)
def test_a_slot_is_shared_out_among_the_tokens_that_it_stands_for(name, tmp_path):
    model = longfit.wrap(tiny_model("llama"), learned(name))
    memory = model.compress(prompt(1, TOKENS))
    memory.save(tmp_path / "m")
    found = kept(memory, no_text(TOKENS))
    sources = memory.cache.slot_spans
    lengths = (sources[..., 1] - sources[..., 0]).reshape(-1)
    spread = found.share[: int(sources.max())]
    if int(lengths.sum()) == len(spread):  # every token of the context is in one slot
        expected = np.repeat(1 / lengths.numpy(), lengths.numpy())
        assert np.allclose(spread, expected, atol=1e-4)
    assert found.share[-1] == 1  # the raw window
    if "keep_raw" in name:
        assert found.share.tolist() == [1] * TOKENS
        return
    states = memory.cache.encoded is not None and memory.cache.encoded.states is not None
    assert found.share.sum() == pytest.approx(memory.kept_tokens + (len(lengths) if states else 0), abs=1e-2)
    assert np.allclose(kept_on_disk(tmp_path / "m", no_text(TOKENS)).share, found.share)


def test_slots_that_are_trimmed_again_are_told_from_the_live_memory_only(tmp_path):
    model = longfit.wrap(tiny_model("llama"), [learned("autocompressor"), METHODS["knorm"]()], budget="12 tokens")
    memory = model.compress(prompt(1, TOKENS))
    memory.save(tmp_path / "m")
    assert 0 < kept(memory, no_text(TOKENS)).share.sum() <= 12.01
    with pytest.raises(UnsupportedFeatureError, match="with its model"):
        kept_on_disk(tmp_path / "m", no_text(TOKENS))


@pytest.mark.parametrize("behind", [None, "knorm", "strided_kv", "icae"])
def test_what_a_prompt_compressor_left_out_is_kept_by_none(behind, tmp_path):
    strided = longfit.compressors.get("strided_kv", ratio=4, segment_tokens=64)
    icae = longfit.compressors.get("icae", ratio=4, segment_tokens=64, rank=2, adapter="untrained")
    steps = ["truncate", *{None: [], "knorm": ["knorm"], "strided_kv": [strided], "icae": [icae]}[behind]]
    model = longfit.wrap(prompt_model(), steps, budget="120 tokens", tokenizer=bpe_tokenizer())
    memory = model.compress(CONTEXT)
    memory.save(tmp_path / "m")
    found = kept(memory, no_text(CONTEXT.shape[1]))
    read = {place for first, stop in memory.cache.shortened.spans() for place in range(first, stop)}
    held = set(found.share.nonzero()[0].tolist())
    assert held <= read < set(range(CONTEXT.shape[1])) and (held == read or behind == "knorm")
    assert found.share.sum() == pytest.approx(memory.kept_tokens, abs=0.1)
    assert np.allclose(kept_on_disk(tmp_path / "m", no_text(CONTEXT.shape[1])).share, found.share)
    again = longfit.Memory.load(tmp_path / "m", model)
    assert np.allclose(kept(again, no_text(CONTEXT.shape[1])).share, found.share)


def test_offloading_drops_nothing(tmp_path):
    model = longfit.wrap(tiny_model("llama"), attention="offloaded", window_tokens=8, block_tokens=4, sink_tokens=2)
    assert kept(model.compress(prompt(1, TOKENS)), no_text(TOKENS)).share.tolist() == [1] * TOKENS


def test_a_passage_is_the_mean_of_its_tokens():
    source = Source("##abcd..xyz", (Document("one", "abcd"), Document("two", "xyz")), (2, 8), (0, 2, 5, 6, 8))
    spans = spans_of(source)
    assert spans.tolist() == [[OUTSIDE] * 3, [0, 0, 3], [0, 3, 4], [OUTSIDE] * 3, [1, 0, 3]]
    found = Kept(np.array([[0, 1, 0, 0, 1], [0, 1, 1, 0, 0]], np.float32), (0, 1), spans)
    assert found.share.tolist() == [0, 1, 0.5, 0, 0.5]
    assert found.of_span(0, 4) == 0.75 and found.of_span(3, 4) == 0.5 and found.of_span(0, 1, document=1) == 0.5
    assert found.of_span(4, 9) is None and found.of_span(0, 3, document=2) is None


def test_a_tokenizer_that_cannot_say_where_tokens_begin_is_refused():
    with pytest.raises(InputError, match="fast"):
        spans_of(Source("abc", (Document("one", "abc"),), (0,)))


def test_another_text_and_another_folder_are_refused(tmp_path):
    model = longfit.wrap(tiny_model("llama"), "knorm", budget="24 tokens")
    memory = model.compress(prompt(1, TOKENS))
    memory.save(tmp_path / "m")
    for made in (lambda: kept(memory, no_text(3)), lambda: kept_on_disk(tmp_path / "m", no_text(3))):
        with pytest.raises(InputError, match="70 tokens and 3"):
            made()
    next((tmp_path / "m").glob("*.safetensors")).write_bytes(b"nothing")
    with pytest.raises(MemoryFileError):
        kept_on_disk(tmp_path / "m", no_text(TOKENS))


def unpacked(text):
    given = json.loads(text)
    cells = sum(len(document["lengths"]) for document in given["documents"])
    rows = np.frombuffer(zlib.decompress(base64.b64decode(given["map"])), np.uint8)
    return given, rows.reshape(1 + len(given["layers"]), cells)


def test_a_picture_covers_the_whole_text_and_counts_as_javascript_does():
    text = "a\U0001f600b c"
    starts = (0, 1, 1, 2, 3)  # two tokens are bytes of the one emoji
    source = Source(f"{text}##", (Document("one", text, (Page(1, 0, 2), Page(2, 2, 5))),), (0,), (*starts, 5))
    shares = np.array([[0, 1, 0, 1, 1, 0], [0, 1, 1, 0, 1, 0]], np.float32)
    given, rows = unpacked(picture(Kept(shares, (1, 3), spans_of(source)), source.documents))
    (document,) = given["documents"]
    assert document["lengths"] == [1, 2, 1, 2] and sum(document["lengths"]) == len(text.encode("utf-16-le")) // 2
    assert document["pages"] == [[1, 0, 3], [2, 3, 6]]
    assert rows.tolist() == [[0, 75, 50, 100], [0, 50, 100, 100], [0, 100, 0, 100]]
    assert given["layers"] == [1, 3] and given["share"] == [50, 50, 50]

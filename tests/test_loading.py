"""`longfit.load`: names, folders, GGUF files, conversion that is all or nothing, the choices it makes."""

from __future__ import annotations

import pytest
import torch

from longfit import loading
from longfit.errors import LoadError
from longfit.loading import load, resolve_name
from longfit.packaged import is_cached
from tests.tiny_models_on_disk import same_logits, save_tiny, tiny_llama, tiny_tokenizer

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
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
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

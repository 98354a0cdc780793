"""GGUF files become the models they were made from, rotary scaling included."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, TokenizersBackend

from longfit import gguf_loading
from longfit.errors import LoadError
from longfit.loading import load
from tests.tiny_models_on_disk import same_logits, tiny_llama, write_gguf

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


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

"""Exports: what PEFT loads as a cartridge, and the base model as input embeddings, says what longfit says."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import longfit
from longfit.errors import InputError, UnsupportedFeatureError
from longfit.export import EMBEDDINGS, export_cartridge, export_prompt_embeds
from tests.methods import METHODS
from tests.soft_models import move
from tests.test_learned_wrapper import CASES, learned, moved, prompt
from tests.tiny import tiny_model

HOW = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("name", ["snapkv", "finch", "streaming_llm", "strided_kv"])
def test_peft_goes_on_from_a_cartridge_as_longfit_does(name, family, tmp_path):
    # A pruning method trims while it answers, so it is compared up to its first token.
    tokens = 6 if name == "strided_kv" else 1
    method = learned(name) if name == "strided_kv" else METHODS[name]()
    model = longfit.wrap(tiny_model(family), method, budget=None if name == "strided_kv" else "20 tokens")
    memory, question = model.compress(prompt(1, 60)), prompt(1, 6, 3)
    how = {**HOW, "max_new_tokens": tokens, "output_scores": True, "return_dict_in_generate": True}
    expected = model.generate(question, memory=memory, **how)
    export_cartridge(memory, model, tmp_path / "c")
    loaded = PeftModel.from_pretrained(longfit.unwrap(model), str(tmp_path / "c"))
    ids = question
    for step in range(tokens):
        with torch.no_grad():
            logits = loaded(ids, use_cache=True).logits[:, -1]
        torch.testing.assert_close(logits, expected.scores[step], rtol=1e-4, atol=1e-4)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(ids, expected.sequences)


@pytest.mark.parametrize("name", CASES)
def test_soft_slots_are_input_embeddings_of_the_base_model_or_of_it_with_the_readers_adapter(name, tmp_path):
    model = longfit.wrap(tiny_model("llama"), learned(name))
    encoder = model.longfit.encoder
    move(encoder)
    memory, question, folder = model.compress(prompt(1, 60)), prompt(1, 6, 3), tmp_path / "e"
    if encoder.memory != "soft":
        with pytest.raises(UnsupportedFeatureError, match="only soft slots"):
            export_prompt_embeds(memory, model, folder)
        return
    expected, adapted = model.generate(question, memory=memory, **HOW)[:, 6:], encoder.reads_with is not None
    files = export_prompt_embeds(memory, model, folder)
    assert all(file.is_file() for file in files)
    client = (folder / "client.py").read_text()
    compile(client, "client.py", "exec")
    base = longfit.unwrap(model)
    embeds = base.get_input_embeddings()(question)
    given = load_file(folder / EMBEDDINGS)["prompt_embeds"][None]
    assert ("--enable-lora" in client, '"model": "reader"' in client) == (adapted, adapted)
    if adapted:
        base = PeftModel.from_pretrained(base, str(folder / "reader"))
    embeds = torch.cat([given, embeds], 1)
    out = base.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **HOW)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
@pytest.mark.parametrize("name", ["gist", "nugget", "autocompressor", "mean_pool"])
def test_a_cartridge_that_is_read_with_an_adapter_brings_it_along(name, family, tmp_path):
    model = moved(name, family)
    memory, question, folder = model.compress(prompt(1, 60)), prompt(1, 6, 3), tmp_path / "c"
    how = {**HOW, "max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    expected = model.generate(question, memory=memory, **how).scores[0]
    with pytest.warns(UserWarning, match="merge it into the model"):
        export_cartridge(memory, model, folder)
    base = longfit.unwrap(model)
    merged = PeftModel.from_pretrained(base, str(folder / "reader")).merge_and_unload()
    with torch.no_grad():
        logits = PeftModel.from_pretrained(merged, str(folder))(question, use_cache=True).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cepe", "lcirc"])
def test_a_memory_that_is_read_by_cross_attention_is_no_cartridge(name, tmp_path):
    model = moved(name, "llama")
    with pytest.raises(UnsupportedFeatureError, match="cross-attention has no keys and values"):
        export_cartridge(model.compress(prompt(1, 60)), model, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_exported_is_refused(tmp_path):
    model = longfit.wrap(tiny_model("llama"), METHODS["adakv"](), budget="20 tokens")
    with pytest.raises(UnsupportedFeatureError, match="budgets"):
        export_cartridge(model.compress(prompt(1, 60)), model, tmp_path / "c")
    model = longfit.wrap(tiny_model("gemma3_text"), METHODS["snapkv"](), budget="20 tokens")
    with pytest.raises(UnsupportedFeatureError, match="sliding"):
        export_cartridge(model.compress(prompt(1, 60)), model, tmp_path / "c")
    model = longfit.wrap(tiny_model("llama"), METHODS["snapkv"](), budget="20 tokens")
    with pytest.raises(InputError, match="rows"):
        export_cartridge(model.compress(prompt(2, 60)), model, tmp_path / "c")
    with pytest.raises(UnsupportedFeatureError, match="soft"):
        export_prompt_embeds(model.compress(prompt(1, 60)), model, tmp_path / "e")

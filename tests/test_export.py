"""Exports: what PEFT loads as a cartridge, and the base model as input embeddings, says what longfit says."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import longfit
from longfit.errors import InputError, UnsupportedFeatureError
from longfit.export import EMBEDDINGS, export_cartridge, export_prompt_embeds
from tests.methods import METHODS
from tests.test_learned_wrapper import CASES, learned, prompt
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
def test_soft_slots_are_input_embeddings_of_the_base_model(name, tmp_path):
    model = longfit.wrap(tiny_model("llama"), learned(name))
    memory, question = model.compress(prompt(1, 60)), prompt(1, 6, 3)
    encoder = model.longfit.encoder
    if encoder.memory != "soft" or "reader" in encoder.lora.names:
        with pytest.raises(UnsupportedFeatureError):
            export_prompt_embeds(memory, model, tmp_path / "e")
        return
    expected = model.generate(question, memory=memory, **HOW)[:, 6:]
    export_prompt_embeds(memory, model, tmp_path / "e")
    base = longfit.unwrap(model)
    given = load_file(tmp_path / "e" / EMBEDDINGS)["prompt_embeds"][None]
    embeds = torch.cat([given, base.get_input_embeddings()(question)], 1)
    out = base.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **HOW)
    assert torch.equal(out, expected)
    compile((tmp_path / "e" / "client.py").read_text(), "client.py", "exec")


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

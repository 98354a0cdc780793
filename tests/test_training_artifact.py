"""Trained weights on disk: what was saved is what is loaded, and what does not fit is refused."""

import dataclasses
import json
import warnings

import pytest
import torch

from longfit.compressors.soft import artifact, available
from longfit.compressors.soft.base import _REGISTRY
from longfit.compressors.soft.qd_lcirc import QDLCIRC
from longfit.compressors.soft.strided_kv import StridedKV
from longfit.errors import FingerprintError, InputError, LoadError
from tests.soft_models import FOREIGN, METHODS, OPTIONS, bound, form
from tests.tiny import tiny_model
from tests.tiny_training import byte_tokenizer, loaded

IDS = torch.arange(2, 42)[None]


@dataclasses.dataclass
class Needy(StridedKV):
    """A method that says nothing untrained, with a module of its own."""

    name = "needy_for_tests"
    needs_training = True
    twist: int = 3

    def make(self, backbone):
        return torch.nn.ModuleDict({"slots": torch.nn.Linear(self.twist, 2)})


# It is not for the lists that other tests run over.
_REGISTRY.pop(Needy.name)


def trained(compressor):
    """Bound, with weights that training might have left."""
    compressor.bind(loaded()[0])
    with torch.no_grad():
        for group in compressor.parameters().values():
            for parameter in group:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return compressor


def answers(compressor):
    with torch.no_grad():
        encoded = compressor.compress(IDS, ratio=compressor.ratio)
        return compressor.read(encoded, IDS[:, :7])


@pytest.fixture
def saved(tmp_path):
    compressor = trained(StridedKV(ratio=3, rank=2, adapter="untrained"))
    artifact.save(compressor, tmp_path / "a", base_name="tiny", trained_ratios=[3, 6], steps=7, recipe={"lr": 1})
    return compressor, tmp_path / "a"


def test_loaded_answers_as_saved_and_takes_its_options(saved):
    before, folder = saved
    after = StridedKV(adapter=str(folder)).bind(loaded()[0])
    assert (after.ratio, after.rank, after.trained_ratios) == (3, 2, (3, 6))
    assert torch.equal(answers(before), answers(after))
    assert after.backbone.model is not before.backbone.model


def test_the_folder_holds_the_adapter_its_facts_and_a_card_and_no_base_weights(saved):
    _, folder = saved
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert names == {
        "README.md",
        "longfit_adapter.json",
        "encoder/adapter_config.json",
        "encoder/adapter_model.safetensors",
    }
    facts = json.loads((folder / "longfit_adapter.json").read_text())
    assert facts["base"]["name"] == "tiny" and facts["steps"] == 7 and facts["recipe"] == {"lr": 1}
    assert json.loads((folder / "encoder" / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    assert "base_model: tiny" in (folder / "README.md").read_text()


def test_the_same_model_in_float32_and_in_bfloat16_is_the_same(saved, tmp_path):
    model = loaded()[0].to(torch.bfloat16)
    compressor = StridedKV(adapter="untrained", rank=2).bind(model)
    artifact.save(compressor, tmp_path / "b", base_name="tiny")
    compressor.release()
    StridedKV(adapter=str(tmp_path / "b")).bind(model.float())


def test_another_model_is_refused_by_its_sizes_and_by_its_weights(saved):
    _, folder = saved
    with pytest.raises(FingerprintError, match="vocab_size"):
        StridedKV(adapter=str(folder)).bind(tiny_model("llama"))
    model = loaded()[0]
    model.model.layers[0].mlp.up_proj.weight.data += 0.5
    with pytest.raises(FingerprintError, match="other weights"):
        StridedKV(adapter=str(folder)).bind(model)
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("case", FOREIGN)
def test_another_encoder_is_refused_by_its_sizes_and_by_its_weights(case, tmp_path):
    artifact.save(bound(case, "llama"), tmp_path / "a", base_name="tiny")
    bound(case, "llama", adapter=str(tmp_path / "a"))
    (other, tokenizer), reader = form(case)[1]["encoder"], tiny_model("llama")
    other.get_input_embeddings().weight.data *= 1.5
    given = {**OPTIONS, **form(case)[1], "adapter": str(tmp_path / "a"), "encoder": (other, tokenizer)}
    with pytest.raises(FingerprintError, match=r"trained with the encoder .* has other weights"):
        available()[form(case)[0]](**given).bind(reader)
    for model in (reader, other):
        assert not any("lora" in name for name, _ in model.named_modules())
    other.config.num_attention_heads = 2
    with pytest.raises(FingerprintError, match=r"trained with the encoder .* with num_attention_heads=4"):
        available()[form(case)[0]](**given).bind(reader)


def test_the_readers_own_weights_as_encoder_and_another_model_are_told_apart(tmp_path):
    first = bound("arc", "llama", tokenizer=byte_tokenizer())
    artifact.save(first.for_reader(tiny_model("qwen3"), byte_tokenizer()), tmp_path / "second", base_name="tiny")
    with pytest.raises(FingerprintError, match="trained with the encoder LlamaForCausalLM"):
        bound("arc", "qwen3", adapter=str(tmp_path / "second"))
    artifact.save(bound("arc", "llama"), tmp_path / "own", base_name="tiny")
    with pytest.raises(FingerprintError, match="trained with the encoder tiny"):
        bound("arc foreign", "llama", adapter=str(tmp_path / "own"), cut_layers=1)
    twin = (tiny_model("llama"), byte_tokenizer())
    bound("arc foreign", "llama", adapter=str(tmp_path / "own"), cut_layers=1, encoder=twin)


def test_a_file_that_is_cut_off_missing_or_changed_is_refused(saved):
    _, folder = saved
    file = folder / "encoder" / "adapter_model.safetensors"
    content = file.read_bytes()
    for broken, message in ((content[:-9], "cut off"), (content[:-1] + b"?", "SHA-256 differs")):
        file.write_bytes(broken)
        with pytest.raises(LoadError, match=message):
            StridedKV(adapter=str(folder)).bind(loaded()[0])
    file.unlink()
    with pytest.raises(LoadError, match="lacks encoder/adapter_model"):
        StridedKV(adapter=str(folder)).bind(loaded()[0])
    (folder / "longfit_adapter.json").write_text('{"format"')
    with pytest.raises(LoadError, match="damaged"):
        StridedKV(adapter=str(folder)).bind(loaded()[0])
    (folder / "longfit_adapter.json").unlink()
    with pytest.raises(LoadError, match="no longfit adapter"):
        StridedKV(adapter=str(folder)).bind(loaded()[0])


def test_another_format_another_method_and_other_options_are_refused(saved):
    _, folder = saved
    with pytest.raises(FingerprintError, match="for strided_kv, not for needy_for_tests"):
        Needy(adapter=str(folder)).bind(loaded()[0])
    model = loaded()[0]
    with pytest.raises(FingerprintError, match="does not fit"):
        StridedKV(adapter=str(folder), rank=5).bind(model)
    assert not any("lora" in name for name, _ in model.named_parameters())
    facts = json.loads((folder / "longfit_adapter.json").read_text())
    (folder / "longfit_adapter.json").write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(FingerprintError, match="format 99"):
        StridedKV(adapter=str(folder)).bind(loaded()[0])


def test_own_modules_are_saved_with_the_options_that_shape_them(tmp_path):
    before = trained(Needy(twist=4, rank=2, adapter="untrained"))
    artifact.save(before, tmp_path / "n", base_name="tiny")
    after = Needy(adapter=str(tmp_path / "n")).bind(loaded()[0])
    assert after.twist == 4
    assert torch.equal(before.modules["slots"].weight, after.modules["slots"].weight)


def test_a_method_that_needs_training_says_where_to_get_it_and_untrained_goes_on():
    with pytest.raises(InputError, match=r"needy_for_tests says nothing untrained.*longfit train.*untrained"):
        Needy().bind(loaded()[0])
    assert Needy(adapter="untrained").bind(loaded()[0]).trained_ratios == ()


def test_shipped_adapters_are_found_by_name(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "shipped_folder", lambda: tmp_path)
    assert artifact.shipped_names() == ["a"]
    assert artifact.shipped_for("strided_kv", loaded()[0]) == ["a"]
    assert artifact.shipped_for("strided_kv", tiny_model("llama")) == []
    assert StridedKV(adapter="a").bind(loaded()[0]).ratio == 3
    with pytest.raises(LoadError, match="longfit ships: a"):
        StridedKV(adapter="b").bind(loaded()[0])


@pytest.mark.parametrize("case", [*METHODS, *FOREIGN])
def test_a_ratio_that_was_not_trained_warns(case, tmp_path):
    before = bound(case, "llama")
    if not before.parameters():
        pytest.skip("nothing trains")
    artifact.save(before, tmp_path / "a", base_name="tiny", trained_ratios=[3, 6])
    compressor = bound(case, "llama", adapter=str(tmp_path / "a"))
    with pytest.warns(UserWarning, match="trained for 3, 6 tokens a slot, not for 5"):
        compressor.compress(IDS, ratio=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compressor.compress(IDS, ratio=6)


def test_so_do_several_ratios_at_once(tmp_path):
    artifact.save(bound("mean_pool", "llama"), tmp_path / "a", base_name="tiny", trained_ratios=[3, 6])
    compressor = bound("mean_pool", "llama", adapter=str(tmp_path / "a"))
    with pytest.warns(UserWarning, match="not for 5"):
        compressor.compress_by_ratio(IDS, [3, 5])


def test_a_question_does_not_keep_the_warning_back(tmp_path):
    options = {"segment_tokens": 12, "ratio": 3}
    artifact.save(QDLCIRC(adapter="untrained", **options).bind(loaded()[0]), tmp_path / "a", trained_ratios=[3, 6])
    compressor = QDLCIRC(adapter=str(tmp_path / "a")).bind(loaded()[0])
    with compressor.asking(IDS[:, :4]), pytest.warns(UserWarning, match="not for 5"):
        compressor.compress(IDS, ratio=5)

"""Memories on disk: saved and loaded equals fresh, in another process too; what is foreign or changed is refused."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import longfit
from longfit.compressors import get
from longfit.errors import FingerprintError, InputError, MemoryFileError, UnsupportedFeatureError
from longfit.memory_file import CONTEXT
from tests.methods import METHODS
from tests.soft_models import move
from tests.test_learned_wrapper import CASES, EVERY_FAMILY, HOW, learned, moved, prompt
from tests.tiny import tiny_model


def answers_alike(model, memory, folder):
    memory.save(folder)
    loaded = longfit.Memory.load(folder, model)
    question = prompt(memory.cache.rows, 6, 3)
    fresh = model.generate(question, memory=memory, output_scores=True, return_dict_in_generate=True, **HOW)
    again = model.generate(question, memory=loaded, output_scores=True, return_dict_in_generate=True, **HOW)
    assert torch.equal(fresh.sequences, again.sequences)
    assert all(torch.equal(a, b) for a, b in zip(fresh.scores, again.scores, strict=True))
    assert loaded.kept_tokens == memory.kept_tokens and loaded.tokens_in == memory.tokens_in


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", METHODS)
def test_kv_memories_come_back_bit_for_bit(name, family, tmp_path):
    model = longfit.wrap(tiny_model(family), METHODS[name](), budget="24 tokens")
    answers_alike(model, model.compress(prompt(2, 70)), tmp_path / "m")


@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("name", CASES)
def test_learned_memories_come_back_bit_for_bit(name, family, tmp_path):
    model = moved(name, family)
    answers_alike(model, model.compress(prompt(2, 50)), tmp_path / "m")


def test_packed_padded_and_bfloat16(tmp_path):
    model = longfit.wrap(
        tiny_model("llama", torch.bfloat16), METHODS["snapkv"](), budget="20 tokens", geometry="packed"
    )
    ids, mask = prompt(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[0, :9] = 0
    answers_alike(model, model.compress(ids, mask), tmp_path / "m")


@pytest.mark.parametrize("name", ["snapkv", "finch", "tova"])
def test_a_memory_for_one_question_keeps_it_and_refuses_others(name, tmp_path):
    model = longfit.wrap(tiny_model("llama"), METHODS[name](), budget="20 tokens", chunk_tokens=16)
    document, question = prompt(1, 60), prompt(1, 6, 3)
    memory = model.compress(document, question_ids=question)
    assert memory.tokens_in == 60 and memory.kept_tokens == 20 and model.fit_report.question_aware
    plain = model.compress(document)
    assert plain.question is None
    memory.save(tmp_path / "m")
    loaded = longfit.Memory.load(tmp_path / "m", model)
    fresh = model.generate(question, memory=memory, **HOW)
    assert torch.equal(fresh, model.generate(question, memory=loaded, **HOW))
    for kept in (memory, loaded):
        with pytest.raises(InputError, match="another question"):
            model.generate(prompt(1, 6, 4), memory=kept, **HOW)


def test_the_question_decides_what_a_memory_keeps():
    model = longfit.wrap(tiny_model("llama"), METHODS["finch"](), budget="12 tokens", chunk_tokens=16)
    kept = [
        model.compress(prompt(1, 60), question_ids=prompt(1, 6, seed)).cache.bounded[0].parts[0].store.positions
        for seed in (3, 4, 3)
    ]
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1])


def test_methods_that_do_not_look_at_a_question_refuse_one():
    for method in (METHODS["knorm"](), learned("strided_kv")):
        model = longfit.wrap(tiny_model("llama"), method, budget="40 tokens")
        with pytest.raises(UnsupportedFeatureError, match="does not look"):
            model.compress(prompt(1, 60), question_ids=prompt(1, 6, 3))


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_qd_lcirc_compresses_for_one_question(family, tmp_path):
    options = {"segment_tokens": 12, "window_tokens": 4, "sink_tokens": 0, "adapter": "untrained", "ratio": 3}
    model = longfit.wrap(tiny_model(family), get("qd_lcirc", **options))
    move(model.longfit.encoder)
    question = prompt(1, 6, 3)
    memory = model.compress(prompt(1, 60), question_ids=question)
    assert memory.tokens_in == 60
    out = model.generate(question, memory=memory, **HOW)
    whole = model.generate(torch.cat([prompt(1, 60), question], 1), question_tokens=6, **HOW)
    assert torch.equal(out[:, 6:], whole[:, 66:])
    memory.save(tmp_path / "m")
    loaded = longfit.Memory.load(tmp_path / "m", model)
    assert torch.equal(out, model.generate(question, memory=loaded, **HOW))
    for kept in (memory, loaded):
        with pytest.raises(InputError, match="another question"):
            model.generate(prompt(1, 6, 4), memory=kept, **HOW)
    with pytest.raises(InputError, match="question"):
        model.compress(prompt(1, 60))


def test_saving_again_replaces_the_old_memory_and_leaves_nothing_behind(tmp_path):
    model = longfit.wrap(tiny_model("llama"), METHODS["snapkv"](), budget="20 tokens")
    model.compress(prompt(1, 60)).save(tmp_path / "m")
    answers_alike(model, model.compress(prompt(1, 50, 2)), tmp_path / "m")
    assert len(list((tmp_path / "m").iterdir())) == 2


class TestRefusals:
    @pytest.fixture
    def saved(self, tmp_path):
        self.model = longfit.wrap(tiny_model("llama"), METHODS["snapkv"](), budget="20 tokens")
        return self.model.compress(prompt(1, 60)).save(tmp_path / "m")

    def test_other_weights_model_dtype_method_options(self, saved):
        changed = tiny_model("llama")
        with torch.no_grad():
            changed.model.layers[0].mlp.up_proj.weight.mul_(1.01)
        others = {
            "weights": longfit.wrap(changed, METHODS["snapkv"](), budget="20 tokens"),
            "model": longfit.wrap(tiny_model("qwen2"), METHODS["snapkv"](), budget="20 tokens"),
            "dtype": longfit.wrap(tiny_model("llama", torch.bfloat16), METHODS["snapkv"](), budget="20 tokens"),
            "method": longfit.wrap(tiny_model("llama"), METHODS["tova"](), budget="20 tokens"),
            "attention": longfit.wrap(
                tiny_model("llama"), METHODS["snapkv"](), budget="20 tokens", attention="sliding_window"
            ),
        }
        for part, other in others.items():
            with pytest.raises(FingerprintError, match=part):
                longfit.Memory.load(saved, other)

    def test_tensors_cut_off_or_changed(self, saved):
        file = next(saved.glob("*.safetensors"))
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(MemoryFileError, match="cut off"):
            longfit.Memory.load(saved, self.model)
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(MemoryFileError, match="changed"):
            longfit.Memory.load(saved, self.model)
        file.unlink()
        with pytest.raises(MemoryFileError):
            longfit.Memory.load(saved, self.model)

    @pytest.mark.parametrize(
        "change",
        [
            {"format": 99},
            {"tensors": "../../etc/passwd"},
            {"tensors": None},
            {"fingerprint": "x"},
            {"cache": {}},
            {"cache": {"rows": "many"}},
        ],
    )
    def test_hostile_descriptions(self, saved, change):
        facts = json.loads((saved / CONTEXT).read_text())
        (saved / CONTEXT).write_text(json.dumps(facts | change))
        with pytest.raises(MemoryFileError):
            longfit.Memory.load(saved, self.model)

    def test_tensors_that_do_not_fit_what_is_said_of_them(self, saved):
        from longfit.memory_file import _sha256

        file, facts = next(saved.glob("*.safetensors")), json.loads((saved / CONTEXT).read_text())
        tensors = load_file(file)
        for change in ({"0.0.keys": tensors["0.0.keys"][..., :4]}, {"0.0.values": tensors["0.0.values"][:, :, :3]}):
            save_file({**tensors, **{k: t.contiguous() for k, t in change.items()}}, file)
            (saved / CONTEXT).write_text(json.dumps(facts | {"sha256": _sha256(file)}))
            with pytest.raises(MemoryFileError):
                longfit.Memory.load(saved, self.model)

    def test_places_that_are_no_memory(self, saved, tmp_path):
        for place in (tmp_path / "nothing", tmp_path):
            with pytest.raises(MemoryFileError, match="no memory"):
                longfit.Memory.load(place, self.model)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.txt").write_text("years of work")
        memory = longfit.Memory.load(saved, self.model)
        with pytest.raises(MemoryFileError, match="other files"):
            memory.save(tmp_path / "other")
        with pytest.raises(InputError, match="wrap"):
            longfit.Memory.load(saved, tiny_model("llama"))


def test_another_process_loads_it(tmp_path):
    model = longfit.wrap(tiny_model("llama"), METHODS["snapkv"](), budget="20 tokens")
    memory = model.compress(prompt(1, 60))
    memory.save(tmp_path / "m")
    here = model.generate(prompt(1, 6, 3), memory=memory, **HOW)[0].tolist()
    script = (
        "import longfit, sys\n"
        "from tests.methods import METHODS\nfrom tests.tiny import tiny_model\n"
        "from tests.test_memory_file import HOW, prompt\n"
        "model = longfit.wrap(tiny_model('llama'), METHODS['snapkv'](), budget='20 tokens')\n"
        f"memory = longfit.Memory.load({str(tmp_path / 'm')!r}, model)\n"
        "print(model.generate(prompt(1, 6, 3), memory=memory, **HOW)[0].tolist())\n"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(there.stdout) == here

"""Every learned method goes through the one loop with its own losses, and its adapter comes back as it was."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from longfit import text_encoders
from longfit.compressors.soft import available
from longfit.training import run
from longfit.training.batches import collate
from longfit.training.data import Episode
from longfit.training.student import question_of
from tests.soft_models import METHODS, OPTIONS
from tests.test_soft_e2llm import tiny_bert
from tests.tiny_models_on_disk import tiny_tokenizer
from tests.tiny_training import byte_tokenizer, loaded, recipe

IDS = torch.arange(2, 98)[None]
TRAINABLE = sorted(case for case in METHODS if not METHODS[case][0].startswith("cramming"))


def options_of(case):
    return {**OPTIONS, **METHODS[case][1], "segment_tokens": 48, "ratio": 4}


def logits(compressor):
    with torch.no_grad(), compressor.asking(IDS[:, :3]):
        return compressor.read(compressor.compress(IDS), IDS[:, :7])


@pytest.mark.parametrize("case", TRAINABLE)
def test_a_method_trains_with_its_own_losses_and_is_loaded_as_it_was_saved(tmp_path, case):
    name = METHODS[case][0]
    kept = []
    given = recipe(compressor={name: options_of(case)}, losses={}, steps=2, save_dtype="float32")
    out = run(
        given,
        tmp_path,
        loaded=loaded(),
        quiet=True,
        hooks=[(2, lambda step, compressor: kept.append(logits(compressor)) or {})],
    )
    assert set(available()[name].losses) <= set(out.losses)
    again = available()[name](adapter=str(out.adapter)).bind(loaded()[0])
    torch.testing.assert_close(logits(again), kept[0], rtol=1e-4, atol=1e-4)


def test_a_query_aware_method_is_trained_for_its_questions(tmp_path):
    given = recipe(compressor={"qd_lcirc": {**options_of("lcirc"), "sink_tokens": 0}}, losses={}, steps=2)
    assert run(given, tmp_path, loaded=loaded(), quiet=True).steps == 2


def test_a_text_encoder_of_its_own_trains_too_and_stays_frozen_where_it_should(tmp_path, monkeypatch):
    bert = tiny_bert(max_position_embeddings=128)
    before = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    monkeypatch.setattr(text_encoders, "load_text_encoder", lambda name, device: (bert, tiny_tokenizer()))
    given = recipe(compressor={"e2llm": {"encoder": "minilm-l6", "ratio": 16, "rank": 2}}, steps=2, losses={"ce": 1.0})
    out = run(given, tmp_path, loaded=loaded(), quiet=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in bert.state_dict().items())
    assert (out.adapter / "encoder" / "adapter_model.safetensors").is_file()
    available()["e2llm"](adapter=str(out.adapter), tokenizer=byte_tokenizer()).bind(loaded()[0])


def test_the_question_is_what_stands_right_before_the_answer():
    def episode(ids, answer):
        return Episode([1], ids, [1.0] * len(ids), [i == answer for i in range(len(ids))], "a", "b")

    batch = collate([episode([2, 3, 4, 5, 6], 3), episode([7, 8, 9], 2)])
    assert question_of(batch).tolist() == [[3, 4], [7, 8]]
    assert question_of(collate([episode([2, 3, 4], 2), episode([5, 6], None)])).tolist() == [[3], [5]]


def test_a_new_reader_trains_on_an_encoder_that_stays_as_it_was_trained(tmp_path):
    first = recipe(compressor={"arc": {**options_of("arc"), "rank": 2, "cut_layers": 1}}, losses={"ce": 1.0}, steps=2)
    trained = run(first, tmp_path / "first", loaded=loaded(), quiet=True)
    options = {"train_encoder": False, "encoder_weights": str(trained.adapter)}
    second = {**first, "compressor": {"arc": {**first["compressor"]["arc"], **options}}}
    made = run(second, tmp_path / "second", loaded=loaded(), quiet=True)
    before, after = (load_file(out.adapter / "encoder" / "adapter_model.safetensors") for out in (trained, made))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    projectors = [load_file(out.adapter / "modules.safetensors") for out in (trained, made)]
    assert not torch.equal(*(given["projector.maps.0.weight"] for given in projectors))
    shutil.rmtree(trained.folder)  # the new adapter has the encoder's weights of its own
    available()["arc"](adapter=str(made.adapter)).bind(loaded()[0])

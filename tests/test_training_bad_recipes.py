"""What a recipe may not say: each mistake is one typed error that names the key, and none is taken silently."""

from dataclasses import fields

import pytest
import yaml
from typer.testing import CliRunner

from longfit.cli import app
from longfit.errors import InputError
from longfit.training import Recipe, run
from longfit.training.limits import EVALUATION, LOSS_OPTIONS, RECIPE
from longfit.training.recipe import Evaluation
from longfit.training.student import LossOptions
from tests.tiny_training import loaded, recipe

NAN, INFINITE = float("nan"), float("inf")
# What YAML makes of the texts that users write is what stands here: `1e-3` is a text, `no` is false.
VALUES = {
    "name": [5, "", None],
    "compressor": [{}, ["gist"], {"gist": 5}, {"gist": {}, "icae": {}}, {5: {}}, "gisst", None],
    "steps": [True, 0, -1, 2.5, "x", NAN, None],
    "model": [5, ""],
    "losses": [["kl"], {"kl": 0}, {"kl": [[0, 0.0], [1, 0]]}, "kl"],
    "losses.kl": [{"kl": "much"}, {"kl": -1}, {"kl": True}, {"kl": [[0.5, 1]]}, {"kl": [[0, 1, 2]]}, {"kl": NAN}],
    "loss_options": [5, {"top_k": 3}],
    "loss_options.kl_top_k": [{"kl_top_k": 0}, {"kl_top_k": "x"}],
    "loss_options.kl_temperature": [{"kl_temperature": 0}],
    "loss_options.tie_gamma": [{"tie_gamma": "x"}],
    "ratios": [4, [0], ["x"], [True], [[0, [4]], [0.5, []]], [[0.2, [4]]], [[0, 4]], ["ab"]],
    "warm_start": [-1, "x"],
    "context_tokens": [0, "x", [], [[0, 64], [0, 96]], [[0, 64], ["x", 96]], [[0, 64.5]], {"0": 64}],
    "target_tokens": [1, "x"],
    "window_tokens": [-1, 96],
    "batch_size": [0, "x"],
    "accumulate": [0, "x"],
    "max_seconds": ["10m", 0, -5, INFINITE],
    "schedule_by": ["hours", "time"],
    "lr": ["fast", -1, 0, NAN, INFINITE, [1e-3], None],
    "warmup_steps": ["x", -3, 1.5],
    "final_lr": ["x", -0.1, 1.5],
    "lr_factors": [5, ["encoder"], {"slots": 5}],
    "lr_factors.encoder": [{"encoder": "x"}, {"encoder": -1}],
    "weight_decay": [-1, "x"],
    "betas": [0.9, [0.9], [0.9, 1.5], [0.9, -0.1], ["x", 0.9]],
    "clip": ["x", 0, -1],
    "mixed_precision": ["foo", True, 16],
    "dtype": ["float7", 16],
    "seed": ["a", -1, 0.5],
    "log_every": [0],
    "checkpoint_every": ["x"],
    "keep_checkpoints": [0],
    "trackers": ["tensorboard", [5]],
    "save_dtype": ["fp8"],
    "evaluation": [5, [3], {"size": 3}],
    "evaluation.n": [{"n": "x"}, {"n": 1}, {"n": -1}],
    "evaluation.every": [{"every": "x"}],
    "evaluation.small": [{"small": 1}],
    "evaluation.ratio": [{"ratio": 0}],
    "evaluation.context_tokens": [{"context_tokens": 64}, {"context_tokens": ["x"]}, {"n": 2, "context_tokens": [500]}],
    "threads": ["x", 0],
    "code": ["mine.py", [5]],
    "data": [{"kind": "lookup"}, ["lookup"], [{"kind": "lookup", 5: 1}], [], 5],
    "data source": [[{"kind": "looking"}], [{"kind": ["lookup"]}], [{}]],
    "strided_kv.rank": [{"strided_kv": {"rank": "x"}}, {"strided_kv": {"rank": 2.5}}, {"strided_kv": {"rank": None}}],
    "encoder_weights": [{"arc": {"cut_layers": 1, "rank": 2, "encoder_weights": "nowhere"}}],
    "arc.reader_adapter": [{"arc": {"reader_adapter": "off"}}],
}
KEYS = {"data source": "data", "strided_kv.rank": "compressor", "encoder_weights": "compressor"}
KEYS |= {"arc.reader_adapter": "compressor"}
OF_LOOKUP = {
    "weight": ["x", -1, NAN, True],
    "kinds": [["word"], {"word": 0}, {"word": "x"}, "word", {"words": 1}],
    "facts": ["x", 0, 1000, 2.5],
    "asked": ["x", 9],
    "on_topic": ["x", 2],
    "files": [5, ["a", "b"], ""],
    "eval_files": [5],
    "long_factor": [0, "x"],
}
OF_TEXT = {"knots": ["x", -1], "chunk_tokens": [0], "files": [5]}
OF_DATASETS = {"dataset": [5], "column": [5], "buffer": [0, "x"], "per_step": [-1], "eval_documents": ["x"]}


def cases(values, **rest):
    return [(name, {**rest, name: value}) for name, given in values.items() for value in given]


SOURCES = [
    *cases(OF_LOOKUP, kind="lookup"),
    *cases(OF_TEXT, kind="text", files="texts"),
    *cases(OF_DATASETS, kind="text", dataset="some/thing"),
]


def refused(folder, given):
    with pytest.raises(InputError) as caught:
        run(given, folder, loaded=loaded(), quiet=True)
    assert not folder.exists()
    return str(caught.value)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, given in VALUES.items() for value in given])
def test_a_value_that_cannot_be_is_refused_by_its_name(name, value, tmp_path):
    message = refused(tmp_path / "run", recipe(**{KEYS.get(name, name.split(".")[0]): value}))
    assert name in message or (name == "compressor" and "learned compressor" in message)
    assert len(message) < 400


@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_an_option_of_a_data_source_that_cannot_be_is_refused_by_its_name(name, source, tmp_path):
    message = refused(tmp_path / "run", recipe(data=[source]))
    assert name in message or (name in ("kinds", "facts", "asked") and "lookup" in message)


def test_a_loss_that_the_method_lacks_is_refused_before_the_first_step(tmp_path):
    given = recipe(losses={"kl": 1.0, "slot_ea": [[0, 0.0], [0.5, 1.0]]})
    assert "strided_kv has no loss slot_ea" in refused(tmp_path / "run", given)


def test_every_key_has_a_limit():
    assert RECIPE.keys() == {field.name for field in fields(Recipe)}
    assert EVALUATION.keys() == {field.name for field in fields(Evaluation)}
    assert LOSS_OPTIONS.keys() == {field.name for field in fields(LossOptions)}


def test_numbers_that_yaml_reads_as_texts_are_numbers(tmp_path):
    file = tmp_path / "written.yaml"
    file.write_text(
        "name: written\ncompressor: {cramming: {learning_rate: 1e-2}}\ndata: [{kind: lookup, weight: 1e0}]\n"
        "steps: 1e3\nlr: 1e-3\nfinal_lr: 1e-1\nweight_decay: 1e-4\nlosses: {kl: 1e0, ce: [[0, 1e-1], [5e-1, 1e0]]}\n"
        "lr_factors: {encoder: 5e-1}\nbetas: [9e-1, 0.95]\ncontext_tokens: '128'\nmixed_precision: no\n"
    )
    assert isinstance(yaml.safe_load(file.read_text())["lr"], str)  # else this test protects nothing
    made = Recipe.read(file)
    assert (made.lr, made.final_lr, made.weight_decay, made.steps) == (1e-3, 0.1, 1e-4, 1000)
    assert isinstance(made.steps, int) and made.context_tokens == 128
    assert made.losses == {"kl": 1.0, "ce": [[0, 0.1], [0.5, 1.0]]} and made.lr_factors == {"encoder": 0.5}
    assert made.betas == [0.9, 0.95] and made.mixed_precision == "no"
    assert made.make_compressor().learning_rate == 0.01


def test_a_recipe_with_such_numbers_goes_on_in_its_folder(tmp_path):
    given = recipe(lr="1e-2", losses={"kl": (("0", "1e0"), (1, 2))}, betas=(0.9, 0.99), steps=2)
    run(given, tmp_path, loaded=loaded(), quiet=True)
    assert run({**given, "steps": 3, "lr": 0.01}, tmp_path, loaded=loaded(), quiet=True).steps == 3


def test_a_recipe_that_is_made_in_python_is_checked_as_well():
    with pytest.raises(InputError, match="lr=-1 has to be a number, above 0"):
        Recipe(name="a", compressor="gist", data=[{"kind": "lookup"}], steps=1, lr=-1)


@pytest.mark.parametrize(
    ("line", "message"),
    [("lr: -1e-3", "lr='-1e-3' has to be a number, above 0"), ("max_seconds: 10m", "max_seconds='10m' has to be")],
)
def test_the_command_ends_in_one_line_and_exit_code_2(line, message, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(f"name: bad\ncompressor: gist\ndata: [{{kind: lookup}}]\nsteps: 2\n{line}\n")
    done = CliRunner().invoke(app, ["train", str(file), "-o", str(tmp_path / "run")])
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_a_folder_whose_config_is_damaged_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("[", encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.yaml' is not YAML"):
        run(recipe(), tmp_path, loaded=loaded(), quiet=True)

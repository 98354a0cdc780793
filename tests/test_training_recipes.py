"""The recipes that longfit comes with: each one is read whole, and its method, ratios and losses take two steps."""

from pathlib import Path

import pytest
import yaml

from longfit.compressors.soft import available
from longfit.training import run
from longfit.training.recipe import Recipe
from longfit.training.schedules import points
from tests.tiny_training import loaded, recipe

FILES = sorted((Path(__file__).parents[1] / "recipes" / "train").glob("*.yaml"))
ARMS = ("strided_kv-gpu", "mean_pool-gpu", "arc-gpu", "autocompressor-gpu", "icae-gpu")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_is_read_and_named_like_its_file(file):
    made = Recipe.read(file)
    assert made.name == file.stem and file.read_text().startswith("# ")
    assert f"longfit train recipes/train/{file.name}" in file.read_text()
    assert made.schedule_by == "steps" or made.max_seconds
    method = next(iter(made.compressor))
    assert method in available()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_method_takes_steps_with_its_losses_at_its_first_and_its_last_ratios(file, tmp_path):
    given = yaml.safe_load(file.read_text())
    name, options = next(iter(given["compressor"].items()))
    if options.keys() & {"encoder", "encoder_weights"}:
        pytest.skip("its encoder is another model")
    options = {key: value for key, value in options.items() if key not in ("segment_tokens", "adapter")}
    ratios = sorted({ratio for _, chosen in points_of(given["ratios"]) for ratio in chosen})
    losses = {loss: max(weight for _, weight in points(value, loss)) for loss, value in given["losses"].items()}
    for ratio in (ratios[0], ratios[-1]):
        small = {"compressor": {name: {**options, "rank": 2}}, "ratios": [ratio], "losses": losses, "steps": 2}
        small |= {"warm_start": min(2, given.get("warm_start", 0)), "accumulate": given.get("accumulate", 1)}
        if name in ("nugget", "arc"):
            small["compressor"][name] |= {"arc": {"cut_layers": 1}}.get(name, {"scorer_layer": 1})
        done = run(recipe(**small), tmp_path / str(ratio), loaded=loaded(), quiet=True)
        assert done.steps == 2 and losses.keys() <= done.losses.keys()


def points_of(ratios):
    return ratios if isinstance(ratios[0], list) else [[0, ratios]]


def test_the_arms_for_a_gpu_see_the_same_data_for_as_long():
    arms = [Recipe.read(next(file for file in FILES if file.stem == name)) for name in ARMS]
    assert len({str((arm.data, arm.target_tokens, arm.seed, arm.max_seconds, arm.dtype)) for arm in arms}) == 1
    assert {arm.batch_size * arm.accumulate for arm in arms} == {8}
    assert {tuple(arm.final_ratios) for arm in arms} == {(4, 8, 16)} and {arm.longest_context for arm in arms} == {1024}

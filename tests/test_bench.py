"""Benchmarks: fresh processes, resuming, verdicts, and the refusal of recipes that cannot run."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from longfit import bench
from longfit.bench import kvpress_worker, measure, runner
from longfit.bench.inputs import prepare_prompt
from longfit.bench.recipe import check_recipe, read_recipe
from longfit.bench.table import summarise
from longfit.errors import InputError

RECIPES = sorted((Path(__file__).parents[1] / "recipes" / "bench").glob("*.yaml"))
TINY = {
    "name": "smoke",
    "model": "tiny",
    "kept": "128 tokens",
    "lengths": [512],
    "systems": ["plain", "longfit:snapkv"],
    "repeats": 1,
    "new_tokens": 3,
    "threads": 1,
    "chunk_tokens": 128,
    "target": [{"metric": "kv_bytes", "system": "longfit:snapkv", "length": 512, "ratio_at_most": 0.5}],
}


def write_recipe(folder: Path, **changes: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(TINY | changes))
    return path


def fake_cell(calls: list[tuple[str, int, int]], stop_at: int | None = None):
    """Stands for a worker: the prefill takes 1 s for plain and 0.5 s for the others."""

    def run_cell(cell, recipe, kvpress_python):
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append((cell["system"], cell["length"], cell["repeat"]))
        return {"status": "done", "prefill_seconds": 1.0 if cell["system"] == "plain" else 0.5}

    return run_cell


def test_plain_and_longfit_run_end_to_end_in_fresh_processes(tmp_path: Path) -> None:
    result = bench.run(write_recipe(tmp_path), output=tmp_path / "run")

    assert result["complete"], result
    plain, longfit = result["rows"]
    assert plain["metrics"]["kept_tokens"]["median"] == 512
    assert 0 < longfit["metrics"]["kept_tokens"]["median"] <= 128 + TINY["new_tokens"]
    for row in (plain, longfit):
        assert row["metrics"]["prefill_seconds"]["min"] > 0
        assert row["metrics"]["decode_seconds_per_token"]["min"] > 0
    assert result["targets"][0]["met"] is True
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "config.yaml",
        "env.json",
        "metrics.json",
        "samples.jsonl",
    }
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == result
    assert "| 512 | longfit:snapkv | 1 |" in bench.render(result)


def test_a_killed_run_resumes_with_the_cells_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, output = write_recipe(tmp_path, repeats=2, target=[]), tmp_path / "run"
    before: list[tuple[str, int, int]] = []
    monkeypatch.setattr(runner, "run_cell", fake_cell(before, stop_at=2))
    with pytest.raises(KeyboardInterrupt):
        bench.run(recipe, output=output)
    with (output / "samples.jsonl").open("a") as file:
        file.write('{"system": "plain", "len')  # a line the kill cut short

    after: list[tuple[str, int, int]] = []
    monkeypatch.setattr(runner, "run_cell", fake_cell(after))
    result = bench.run(recipe, output=output)

    assert result["complete"]
    assert len(before) == len(after) == 2 and not set(before) & set(after)
    assert result["rows"][1]["ratios"]["prefill_seconds"] == {"median": 0.5, "min": 0.5}
    assert len((output / "samples.jsonl").read_text().splitlines()) == 4


def test_a_run_folder_of_another_recipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_cell", fake_cell([]))
    bench.run(write_recipe(tmp_path), output=tmp_path / "run")
    with pytest.raises(InputError, match="another recipe"):
        bench.run(write_recipe(tmp_path, kept="64 tokens"), output=tmp_path / "run")
    with pytest.raises(InputError, match="holds a run already"):
        bench.run(write_recipe(tmp_path), output=tmp_path / "run", resume=False)


@pytest.mark.parametrize(
    ("script", "reason"),
    [("echo trace >&2; echo 'ValueError: boom' >&2; exit 1", "ValueError: boom"), ("kill -9 $$", "signal 9")],
)
def test_a_worker_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    worker = tmp_path / "worker.sh"
    worker.write_text(f"#!/bin/sh\n{script}\n")
    worker.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(worker))
    recipe = check_recipe(TINY, "recipe.yaml")
    sample = runner.run_cell({"system": "plain"}, recipe, None)
    assert sample["status"] == "failed" and reason in sample["reason"]


def test_a_failed_cell_is_shown_and_runs_again_on_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, output = write_recipe(tmp_path, target=[]), tmp_path / "run"
    failed = {"status": "failed", "reason": "no memory left"}
    monkeypatch.setattr(runner, "run_cell", lambda cell, recipe, kvpress_python: failed)
    result = bench.run(recipe, output=output)
    assert not result["complete"] and result["rows"][0]["n"] == 0
    assert "longfit:snapkv at 512: no memory left" in bench.render(result)

    monkeypatch.setattr(runner, "run_cell", fake_cell([]))
    assert bench.run(recipe, output=output)["complete"]


def test_without_a_kvpress_environment_its_cells_are_skipped_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(write_recipe(tmp_path, systems=["plain", "kvpress:snapkv"], target=[]))
    sample = runner.run_cell({"system": "kvpress:snapkv"}, recipe, None)
    assert sample["status"] == "skipped" and "setup.sh" in sample["reason"]
    monkeypatch.setenv("LONGFIT_KVPRESS_PYTHON", str(tmp_path / "absent"))
    with pytest.raises(InputError, match="not a file"):
        runner.find_kvpress_python(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lenghts": [4]}, "did you mean 'lengths'"),
        ({"lengths": []}, "'lengths' is missing"),
        ({"lengths": ["4k"]}, "lengths must be"),
        ({"systems": ["plain", "longfit:snapvk"]}, "did you mean 'snapkv'"),
        ({"systems": ["plain", "kvpress:snapvk"]}, "did you mean 'snapkv'"),
        ({"systems": ["full"]}, "unknown system"),
        ({"baseline": "plain_chunked"}, "not among the systems"),
        ({"kept": "plenty"}, "plenty"),
        ({"dtype": "int8"}, "choose one of"),
        ({"threads": 0}, "threads must be"),
        ({"repeats": {64: 2}}, "no entry for"),
        ({"only": {8: ["plain"]}}, "not among the lengths"),
        ({"target": [{"metric": "prefill_seconds", "system": "plain", "length": 512}]}, "exactly one of"),
        (
            {"target": [{"metric": "kv_bytes", "system": "kvpress:none", "length": 512, "value_at_most": 1}]},
            "target",
        ),
    ],
)
def test_a_broken_recipe_is_refused_with_the_reason(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_recipe(TINY | {"target": []} | changes, "recipe.yaml")


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        bench.run(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="mapping"):
        bench.run(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("{a: [")
    with pytest.raises(InputError, match="YAML"):
        bench.run(tmp_path / "broken.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_longfit_ships_are_valid(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.name == path.stem and recipe.target and recipe.cells()


def test_the_systems_take_turns_and_lead_in_turn() -> None:
    recipe = check_recipe(TINY | {"repeats": 2}, "recipe.yaml")
    assert [cell[0] for cell in recipe.cells()] == ["plain", "longfit:snapkv", "longfit:snapkv", "plain"]


def test_verdicts_compare_with_the_baseline_or_with_another_length() -> None:
    targets = [
        {"metric": "prefill_seconds", "system": "longfit:snapkv", "length": 512, "speedup_at_least": 2.0},
        {"metric": "prefill_seconds", "system": "longfit:snapkv", "length": 512, "ratio_at_most": 0.3},
        {
            "metric": "kv_bytes",
            "system": "longfit:snapkv",
            "length": 512,
            "reference_length": 256,
            "ratio_at_most": 1.1,
        },
        {"metric": "score_share", "system": "longfit:snapkv", "length": 512, "value_at_most": 0.1},
        {"metric": "decode_seconds_per_token", "system": "plain", "length": 512, "value_at_most": 1.0},
    ]
    recipe = check_recipe(TINY | {"lengths": [256, 512], "repeats": 3, "target": targets}, "recipe.yaml")
    samples = {}
    for repeat, seconds in enumerate((1.0, 2.0, 9.0)):
        for length in (256, 512):
            done = {"status": "done", "kv_bytes": 100}
            samples["plain", length, repeat] = done | {"prefill_seconds": 2 * seconds}
            samples["longfit:snapkv", length, repeat] = done | {
                "prefill_seconds": seconds,
                "score_share": 0.2,
            }
    verdicts = summarise(recipe, samples)["targets"]
    assert [verdict["measured"] for verdict in verdicts] == [2.0, 0.5, 1.0, 0.2, None]
    assert [verdict["met"] for verdict in verdicts] == [True, False, True, False, None]


def test_the_peak_is_that_of_the_action_alone() -> None:
    before = torch.ones(64 << 18)  # 64 MiB that were there already
    found = measure.measure_peak(lambda: torch.ones(48 << 18).sum())
    if not found["peak_was_reset"]:
        pytest.skip("the kernel does not allow a reset of the peak")
    assert before.sum() > 0
    assert 40 << 20 < found["extra_peak_bytes"] < 60 << 20


@pytest.mark.parametrize("length", [512, 1000, 4096, 16384, 32768, 131072])
@pytest.mark.parametrize("kept", [1, 100, 511, 2048])
def test_kvpress_is_told_a_ratio_that_keeps_exactly_as_much(length: int, kept: int) -> None:
    ratio = kvpress_worker.compression_ratio(length, kept)
    assert int(length * (1 - ratio)) == min(length, kept)


def test_prompt_text_is_repeated_until_it_is_long_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class WordTokenizer:
        def __call__(self, text: str, **options: object):
            return type("Encoding", (), {"input_ids": [len(word) for word in text.split()]})()

    monkeypatch.setattr("longfit.bench.inputs.AutoTokenizer.from_pretrained", lambda folder: WordTokenizer())
    books = tmp_path / "books"
    books.mkdir()
    (books / "a.txt").write_text("a bb ccc\n\ndddd")
    path = prepare_prompt("some/model", "some/model", 10, tmp_path, str(books))
    assert runner.np.load(path).tolist() == [1, 2, 3, 4, 4, 1, 2, 3, 1, 2]
    with pytest.raises(InputError, match=r"no \.txt files"):
        prepare_prompt("some/model", "some/model", 20, tmp_path, str(tmp_path / "nothing"))

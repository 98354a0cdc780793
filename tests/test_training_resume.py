"""A run that stops, however it stops, goes on to the bits that it would have come to without."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from longfit.training import checkpoint, run
from longfit.training.files import tidy, whole_folder
from tests.tiny_training import loaded, recipe

CHANGING = {"ratios": [2, 4], "context_tokens": [[0, 64], [0.5, 96]], "accumulate": 2, "save_dtype": "float32"}
SMALL = {"rank": 2, "segment_tokens": 32}
# gist's own loss draws slots from torch's random state, autocompressor the lengths of its segments from a generator of
# each step; strided_kv draws nothing.
RECIPES = {
    "strided_kv": recipe(**CHANGING),
    "gist": recipe(
        **CHANGING,
        compressor={"gist": SMALL | {"autoencode": True, "autoencode_slots": 3}},
        losses={"kl": 1.0, "slot_ae": 0.5},
    ),
    "autocompressor": recipe(
        **CHANGING, compressor={"autocompressor": SMALL}, losses={"lm": 1.0, "next_segment": 1.0, "slot_ae": 0.1}
    ),
}


class Stopped(Exception):
    pass


def stop_at_5(step, compressor):
    if step == 5:
        raise Stopped
    return {}


def results(folder):
    """Trained weights, and the log without times."""
    files = sorted((folder / "adapter").rglob("*.safetensors"))
    found = {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return found, [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same(straight, resumed):
    (weights, lines), (found, again) = results(straight), results(resumed)
    assert weights.keys() == found.keys() and weights
    for name, tensor in weights.items():
        assert torch.equal(tensor, found[name]), name
    assert lines == again


@pytest.mark.parametrize("name", RECIPES)
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, name):
    straight, stopped, given = tmp_path / "straight", tmp_path / "stopped", RECIPES[name]
    run(given, straight, loaded=loaded(), quiet=True)
    with pytest.raises(Stopped):
        run(given, stopped, loaded=loaded(), quiet=True, hooks=[(1, stop_at_5)])
    assert len(results(straight)[1]) == 6 and not (stopped / "adapter").exists()
    torch.manual_seed(99)
    run(given, stopped, loaded=loaded(), quiet=True)
    assert_same(straight, stopped)


KILLED = """
import os, signal, sys
from longfit.training import checkpoint, run
from tests.test_training_resume import RECIPES
from tests.tiny_training import loaded

plain, written = checkpoint.save_file, []

def save_file(weights, path):
    plain(weights, path)
    written.append(path)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_file = save_file
run(RECIPES["gist"] | {"threads": int(sys.argv[2])}, sys.argv[1], loaded=loaded(), quiet=True)
"""


def test_a_process_killed_while_it_writes_a_checkpoint_goes_on_to_the_same_bits(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", KILLED, str(killed), str(torch.get_num_threads())]
    assert subprocess.run(command, env=environment, timeout=300, check=False).returncode == -signal.SIGKILL
    checkpoints = killed / "checkpoints"
    (half,) = checkpoints.glob(".step-000004.*.tmp")
    assert (half / checkpoint.WEIGHTS).is_file()
    run(RECIPES["gist"], killed, loaded=loaded(), quiet=True)
    run(RECIPES["gist"], straight, loaded=loaded(), quiet=True)
    assert_same(straight, killed)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000004", "step-000006"]


@pytest.fixture(scope="module")
def dead():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def folder_with(path, text):
    path.mkdir()
    (path / "file").write_text(text)


def test_what_a_dead_process_left_goes_and_what_a_running_one_writes_stays(tmp_path, dead):
    folder_with(tmp_path / "step-000002", "whole")
    folder_with(tmp_path / f".step-000002.{dead}.old", "before")
    folder_with(tmp_path / f".step-000004.{dead}.tmp", "half")
    folder_with(tmp_path / f".step-000004.{os.getpid()}.tmp", "half, of a process that had this one's id")
    folder_with(tmp_path / f".step-000004.{os.getppid()}.tmp", "being written")
    folder_with(tmp_path / ".someone.elses.tmp", "not ours")
    tidy(tmp_path)
    kept = {".someone.elses.tmp", f".step-000004.{os.getppid()}.tmp", "step-000002"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert (tmp_path / "step-000002" / "file").read_text() == "whole"


def test_a_folder_that_was_set_aside_comes_back_where_its_successor_did_not_arrive(tmp_path, dead):
    folder_with(tmp_path / f".step-000002.{dead}.old", "before")
    folder_with(tmp_path / f".step-000002.{dead}.tmp", "perhaps half")
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    assert (tmp_path / "step-000002" / "file").read_text() == "before"


def test_looking_for_the_newest_checkpoint_clears_what_was_left(tmp_path, dead):
    folder_with(tmp_path / f".step-000004.{dead}.tmp", "half")
    assert checkpoint.newest(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_writing_a_folder_clears_what_was_left_of_the_same_one(tmp_path, dead):
    folder_with(tmp_path / f".adapter.{dead}.tmp", "half")
    folder_with(tmp_path / f".other.{dead}.tmp", "half")
    with whole_folder(tmp_path / "adapter") as temporary:
        (temporary / "file").write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", f".other.{dead}.tmp"}

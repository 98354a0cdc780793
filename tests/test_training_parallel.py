"""Training in two processes: DDP and FSDP take the same steps, and other ones than a single process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from longfit.training import run
from tests.tiny_training import loaded, recipe
from tests.two_processes import RECIPES

SCRIPT = Path(__file__).with_name("two_processes.py")


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def trained(kind, name, folder):
    """The folder of a run in two processes."""
    model, tokenizer = loaded()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    roots = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": roots}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(SCRIPT), kind, name, str(folder / "model"), str(folder / kind)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / kind


@pytest.mark.parametrize("name", RECIPES)
def test_sharded_or_not_two_processes_take_the_same_steps_on_batches_of_their_own(name, tmp_path):
    alone, whole, sharded = tmp_path / "alone", *(trained(kind, name, tmp_path) for kind in ("ddp", "fsdp"))
    run(recipe(**RECIPES[name]), alone, loaded=loaded(), quiet=True)
    assert [line[0] for line in losses(whole)] == [1, 2, 3]  # written by one of the two
    for one, other in zip(losses(whole), losses(sharded), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert losses(alone)[0] != pytest.approx(losses(whole)[0], rel=1e-4)
    one, other = (load_file(folder / "adapter" / "modules.safetensors") for folder in (whole, sharded))
    assert one.keys() == other.keys()
    assert all((one[key] - other[key]).abs().max() < 1e-4 for key in one)

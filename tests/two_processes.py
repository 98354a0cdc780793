"""One of two CPU processes that train a tiny model: torchrun two_processes.py ddp|fsdp NAME MODEL FOLDER.

accelerate takes FSDP for accelerators only; told that these are some, it shards on CPUs as well.
"""

import os
import sys

from accelerate import Accelerator
from accelerate.state import DistributedType, PartialState

from longfit.training import run
from tests.tiny_training import recipe

RECIPES = {
    "arc": {"compressor": {"arc": {"rank": 4, "cut_layers": 1}}, "warm_start": 2, "losses": {"ae": 1.0}, "steps": 3},
    "lcirc": {"compressor": {"lcirc": {"sink_tokens": 0}}, "losses": {"lm": 1.0}, "steps": 3},
}

if __name__ == "__main__":
    kind, name, model, folder = sys.argv[1:]
    if kind == "fsdp":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    state = Accelerator().state
    wanted = DistributedType.FSDP if kind == "fsdp" else DistributedType.MULTI_CPU
    assert (state.distributed_type, state.num_processes) == (wanted, 2), state
    run(recipe(model=model, **RECIPES[name]), folder, quiet=True)

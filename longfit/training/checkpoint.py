"""Checkpoints: trained weights, optimizer, random states and where the run stands; whole or not there at all."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longfit.errors import TrainingError
from longfit.training.files import sha256_of, tidy, whole_folder

STATE, WEIGHTS, OPTIMIZER, RANDOM = "state.json", "trained.safetensors", "optimizer.pt", "random-{}.pt"


def save(
    folder: Path, accelerator: Accelerator, student: nn.Module, optimizer: Any, state: dict[str, Any], keep: int
) -> None:
    """Write `folder`/step-000123 for `state["step"]` = 123, and drop all but the newest `keep`.

    All processes call it.
    """
    weights, moments = _gathered(accelerator, student, optimizer)
    target = folder / f"step-{state['step']:06d}"
    shared = folder / "random"
    shared.mkdir(parents=True, exist_ok=True)
    own = shared / RANDOM.format(accelerator.process_index)
    torch.save(_random_state(), own)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with whole_folder(target) as temporary:
            save_file(weights, temporary / WEIGHTS)
            torch.save(moments, temporary / OPTIMIZER)
            for process in range(accelerator.num_processes):
                shutil.copy(shared / RANDOM.format(process), temporary)
            files = {file.name: sha256_of(file) for file in temporary.iterdir()}
            (temporary / STATE).write_text(json.dumps({**state, "files": files}, indent=1), encoding="utf-8")
        shutil.rmtree(shared, ignore_errors=True)
        for old in _all(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state, or None; a damaged one is said on stderr and passed over.

    What a process that was killed while it wrote one left in `folder` is cleared away.

    Raises:
        TrainingError: there are checkpoints, and all are damaged.
    """
    tidy(folder)
    found, reasons = _all(folder), []
    for path in reversed(found):
        try:
            return path, _state(path)
        except (OSError, ValueError, KeyError) as error:
            reasons.append(f"{path.name}: {error}")
            print(f"checkpoint {path.name} is damaged ({error}); trying the one before", file=sys.stderr)
    if found:
        raise TrainingError(
            f"all checkpoints in {folder} are damaged ({'; '.join(reasons)}); remove the folder to start over"
        )
    return None


def restore(path: Path, accelerator: Accelerator, student: nn.Module, optimizer: Any) -> None:
    """Put a checkpoint into the prepared student and optimizer, and the process's random states back.

    Raises:
        TrainingError: its weights are not this student's.
    """
    weights = load_file(path / WEIGHTS)
    moments = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    plain = accelerator.unwrap_model(student)
    own = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    if own.keys() != weights.keys():
        raise TrainingError(f"checkpoint {path} has other weights than the recipe's method trains; start a new run")
    if accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
        given: dict[str, Any] = dict(weights)
        set_state_dict(student, optimizer.optimizer, model_state_dict=given, optim_state_dict=moments, options=options)
    else:
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
        optimizer.load_state_dict(moments)
    file = path / RANDOM.format(accelerator.process_index)
    if file.is_file():
        _set_random_state(torch.load(file, map_location="cpu", weights_only=True))


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _state(path: Path) -> dict[str, Any]:
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    for name, wanted in state["files"].items():
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if sha256_of(path / name) != wanted:
            raise ValueError(f"{name} is not what was written")
    return state


def _gathered(accelerator: Accelerator, student: nn.Module, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole trained weights by name, and the optimizer's state, on the CPU."""
    if accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        found: Any = get_state_dict(student, optimizer.optimizer, options=options)
        return {name: tensor.contiguous() for name, tensor in found[0].items()}, dict(found[1])
    plain = accelerator.unwrap_model(student)
    own = {name: p.detach().cpu().contiguous() for name, p in plain.named_parameters() if p.requires_grad}
    return own, optimizer.state_dict()


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

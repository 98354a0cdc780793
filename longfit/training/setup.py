"""What a run checks before its first step, and how its optimizer is made."""

import random
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from longfit.compressors.soft import LearnedCompressor
from longfit.errors import InputError
from longfit.training.batches import Batches
from longfit.training.recipe import Recipe
from longfit.training.schedules import linear, stepwise
from longfit.training.student import LOSSES, Student
from longfit.yaml_file import read_mapping

CONFIG = "config.yaml"


def make_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """accelerate as it was launched, with the recipe's precision and trackers.

    Raises:
        InputError: a precision that this machine, or this process, cannot have.
    """
    wanted = f"mixed_precision={recipe.mixed_precision!r}"
    if recipe.mixed_precision == "fp16" and PartialState().device.type == "cpu":
        raise InputError(f"{wanted} needs a GPU, and this runs on a CPU; use no or bf16")
    try:
        return Accelerator(
            mixed_precision=recipe.mixed_precision,
            log_with=list(recipe.trackers) or None,
            project_dir=str(folder),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:
        # One process has one precision: accelerate keeps it for good.
        raise InputError(f"{wanted} cannot be had here: {error}") from error


def check_processes(accelerator: Accelerator, path: Path, state: dict[str, Any]) -> None:
    """Refuse to go on with more or fewer processes than before: what each one draws depends on their number.

    Args:
        path: of the checkpoint, which has the random state of every process; state: as it was saved.

    Raises:
        InputError: their number, then and now.
    """
    before, now = sum(name.startswith("random-") for name in state["files"]), accelerator.num_processes
    if before != now:
        raise InputError(
            f"{path} comes from a run in {_processes(before)}; this one, in {_processes(now)}, would draw other "
            f"batches. Launch {before} again (accelerate launch --num_processes {before}), or give another folder"
        )


def _processes(number: int) -> str:
    return f"{number} process{'' if number == 1 else 'es'}"


def refuse_another_recipe(folder: Path, recipe: Recipe) -> None:
    """See that a folder is not another recipe's.

    Raises:
        InputError: it is; what may differ is in `recipe.FREE`.
    """
    file = folder / CONFIG
    before = read_mapping(file) if file.is_file() else recipe.to_dict()
    if different := recipe.differs(before):
        raise InputError(f"{folder} holds a run of another recipe ({', '.join(different)} differ); give another folder")


def check_sharding(accelerator: Accelerator, given: bool = False) -> None:
    """Refuse FSDP as the student cannot run under it.

    A layer runs several times in one forward (encoder, reader, teacher), and what the encoder hands on are keys and
    values, not its output: a layer that FSDP shards by itself is already sharded again when its second gradient comes.
    The student as one unit has one forward and one backward. At the end the model is loaded once more, whole.

    Args:
        given: the model was given, so that nobody knows where to load it from.

    Raises:
        InputError: what to set.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin is None or plugin.fsdp_version != 2 or plugin.auto_wrap_policy is not None:
        raise InputError(
            "FSDP has to keep compressor and reader in one unit, with weights of several dtypes: set fsdp_version: 2 "
            "and fsdp_auto_wrap_policy: NO_WRAP in accelerate's config"
        )
    if given:
        raise InputError("FSDP loads the model again to save what was trained: name it in the recipe (model: ...)")


def make_optimizer(recipe: Recipe, compressor: LearnedCompressor) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    groups, betas = parameter_groups(recipe, compressor), (recipe.betas[0], recipe.betas[1])
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, weight_decay=recipe.weight_decay)


def parameter_groups(recipe: Recipe, compressor: LearnedCompressor) -> list[dict[str, Any]]:
    """One group for each of `compressor.parameters()`, with its factor of the learning rate.

    Raises:
        InputError: a factor for a group that there is not.
    """
    groups = compressor.parameters()
    if unknown := sorted(set(recipe.lr_factors) - set(groups)):
        raise InputError(f"lr_factors names {', '.join(unknown)}; {compressor.name} trains {', '.join(groups)}")
    return [
        {"params": given, "factor": float(recipe.lr_factors.get(name, 1.0)), "name": name}
        for name, given in groups.items()
    ]


def check_lengths(recipe: Recipe, model: Any) -> None:
    """Refuse contexts that the model has no positions for. (What an encoder of the method's own has no positions for,
    the method refuses.)

    Raises:
        InputError: what would fit.
    """
    longest, evaluation = recipe.longest_context, recipe.evaluation_settings
    window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if window and longest + recipe.target_tokens > window:
        raise InputError(
            f"context_tokens={longest} and target_tokens={recipe.target_tokens} do not fit into the model's {window} "
            "positions; lower them"
        )
    evaluated = max(evaluation.context_tokens, default=0) if evaluation.n or evaluation.every else 0
    if window and evaluated + recipe.target_tokens > window:
        raise InputError(
            f"evaluation.context_tokens={evaluated} and target_tokens={recipe.target_tokens} do not fit into the "
            f"model's {window} positions; lower them"
        )


def check_losses(recipe: Recipe, student: Student, losses: dict[str, Any], batches: Batches) -> None:
    """Compute the losses of the method's own that a schedule begins at 0: a wrong name shows now, not at half of a run.

    Raises:
        InputError: the method has none of that name.
    """
    compressor = student.compressor
    later = [name for name, weight in losses.items() if name not in LOSSES and not linear(weight, 0.0, name)]
    if later:
        batch = batches.batch(0, stepwise(recipe.context_tokens, 0.0, "context_tokens")).to(compressor.backbone.device)
        with torch.no_grad(), compressor.drawing(random.Random(0)):
            student(batch, dict.fromkeys(later, 1.0), (recipe.ratios_at(0.0) or [compressor.ratio])[0])

"""What a run checks before its first step, and how its optimizer is made."""

from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType

from longfit.compressors.soft import LearnedCompressor
from longfit.errors import InputError
from longfit.training.recipe import Recipe

CONFIG = "config.yaml"


def refuse_another_recipe(folder: Path, recipe: Recipe) -> None:
    """See that a folder is not another recipe's.

    Raises:
        InputError: it is; what may differ is in `recipe.FREE`.
    """
    file = folder / CONFIG
    before = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else recipe.to_dict()
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
    longest = recipe.longest_context
    window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if window and longest + recipe.target_tokens > window:
        raise InputError(
            f"context_tokens={longest} and target_tokens={recipe.target_tokens} do not fit into the model's {window} "
            "positions; lower them"
        )

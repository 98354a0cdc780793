"""What each value of a recipe may be: one line a key."""

from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from longfit.errors import InputError
from longfit.loading import DTYPES
from longfit.training.checks import (
    Check,
    flag,
    listed,
    mapping,
    number,
    one_of,
    optional,
    refusal,
    table,
    text,
    whole,
)
from longfit.training.schedules import choices, points, schedule

LARGEST_SEED = 2**63 - 1


def _compressor(value: Any, name: str) -> Any:
    """A method's name, or one name with its options."""
    if isinstance(value, str):
        return text(value, name)
    if not isinstance(value, dict) or len(value) != 1 or not isinstance(next(iter(value)), str):
        raise refusal(value, name, "the name of one method, or a mapping of one name to its options: {gist: {rank: 8}}")
    return {method: optional(mapping())(options, f"{name}.{method}") for method, options in value.items()}


def _ratios(value: Any, name: str) -> list[Any]:
    found = choices(value, name)
    scheduled = any(isinstance(entry, list | tuple) for entry in value)
    return [[start, ratios] for start, ratios in found] if scheduled else found[0][1]


LOSS_OPTIONS: dict[str, Check] = {
    "kl_top_k": optional(whole(1)),
    "kl_temperature": number(above=0),
    "tie_gamma": optional(number(least=0)),
    "skip_first": whole(0),
    "detach_segments": whole(0),
}
EVALUATION: dict[str, Check] = {
    "every": whole(0),
    "small": whole(2),
    "n": whole(0),
    "batch_size": whole(1),
    "context_tokens": listed(whole(1), "whole numbers"),
    "ratio": optional(whole(1)),
}
RECIPE: dict[str, Check] = {
    "name": text,
    "compressor": _compressor,
    "data": listed(mapping(), "mappings"),
    "steps": whole(1),
    "model": text,
    "losses": mapping(schedule(number(least=0))),
    "loss_options": table(LOSS_OPTIONS),
    "ratios": _ratios,
    "warm_start": whole(0),
    "context_tokens": schedule(whole(1)),
    "target_tokens": whole(2),
    "window_tokens": whole(0),
    "batch_size": whole(1),
    "accumulate": whole(1),
    "max_seconds": optional(number(above=0, hint=" (of seconds)")),
    "schedule_by": one_of("steps", "time"),
    "lr": number(above=0),
    "warmup_steps": whole(0),
    "final_lr": number(least=0, most=1),
    "lr_factors": mapping(number(least=0)),
    "weight_decay": number(least=0),
    "betas": listed(number(least=0, below=1), "numbers", length=2),
    "clip": number(above=0, hint=" (a large one clips nothing)"),
    "mixed_precision": one_of("no", "bf16", "fp16"),
    "dtype": one_of("auto", *DTYPES),
    "seed": whole(0, LARGEST_SEED),
    "log_every": whole(1),
    "checkpoint_every": whole(1),
    "keep_checkpoints": whole(1),
    "trackers": listed(text, "names"),
    "save_dtype": one_of("float32", "bfloat16"),
    "evaluation": table(EVALUATION),
    "threads": optional(whole(1)),
    "code": listed(text, "files"),
}
# Of sources of data; `lookup` checks its own.
SOURCES: dict[str, Check] = {
    "files": text,
    "eval_files": optional(text),
    "long_factor": number(above=0),
    "long_tokens": whole(1),
    "knots": whole(0),
    "chunk_tokens": whole(1),
    "dataset": text,
    "config": optional(text),
    "split": text,
    "column": text,
    "revision": optional(text),
    "buffer": whole(1),
    "per_step": whole(0),
    "eval_documents": whole(1),
}
BY_TYPE: dict[Any, Check] = {bool: flag, float: number(), int: number(whole=True)}


def checked(given: dict[str, Any]) -> dict[str, Any]:
    """The values of a whole recipe as they are used.

    Raises:
        InputError: one that cannot be, or two that do not go together.
    """
    found = {name: RECIPE[name](value, name) for name, value in given.items()}
    window, evaluation, losses = found["window_tokens"], found["evaluation"], found["losses"]
    trained = [tokens for _, tokens in points(found["context_tokens"], "context_tokens")]
    for name, lengths in (("", trained), ("evaluation.", evaluation.get("context_tokens"))):
        if lengths and min(lengths) <= window:
            raise InputError(f"{name}context_tokens={min(lengths)} has to be above window_tokens={window}")
    if found["schedule_by"] == "time" and not found["max_seconds"]:
        raise InputError("schedule_by: time goes together with max_seconds; give that too, or schedule_by: steps")
    if evaluation.get("n") == 1:
        raise InputError("evaluation.n=1 has to be 0 for none, or at least 2: a shuffled memory needs another document")
    if losses and not any(weight for name in losses for _, weight in points(losses[name], name)):
        raise InputError(f"losses={losses!r}: nothing has a weight; give one of them a number above 0")
    return found


def checked_options(kind: type, given: dict[str, Any], name: str) -> dict[str, Any]:
    """Options of a dataclass by its annotations: those that are numbers or flags are checked, the rest passes.

    Raises:
        InputError: a value that is not what the annotation says.
    """
    found = dict(given)
    for option in fields(kind):
        union = get_origin(option.type) in (Union, UnionType)
        kinds = get_args(option.type) if union else (option.type,)
        check = next((BY_TYPE[kind] for kind in kinds if kind in BY_TYPE), None)
        if check is None or option.name not in found or str in kinds:
            continue
        check = optional(check) if NoneType in kinds else check
        found[option.name] = check(found[option.name], f"{name}.{option.name}")
    return found

"""What lm-eval's ``model_args`` say of a compressor, as a cell of our own evaluation."""

import json
from collections.abc import Mapping
from typing import Any

from longfit.errors import InputError
from longfit.eval.cells import Cell


def cell_of(
    compressor: str | None,
    budget: str | None,
    total: str | None,
    *,
    chunk_tokens: int | None,
    aware: bool,
    options: str | Mapping[str, Any] | None,
    more: Mapping[str, Any],
) -> Cell:
    """The cell that the arguments of `LongfitLM` spell out; its method is "full" where no compressor is named.

    Raises:
        InputError: an unknown argument, a compressor without a budget, a budget without a compressor.
    """
    chosen, plain = _options(options, more), compressor in (None, "full")
    if plain and (chosen or total or budget not in (None, "100%")):
        raise InputError("a budget or options without a compressor; name one, as compressor=snapkv")
    if not plain and not (budget or total):
        raise InputError(f"compressor={compressor} needs a budget, as budget=25%")
    size = budget or (f"{total} in total" if total else "100%")
    return Cell(compressor or "full", str(size), "aware" if aware else "agnostic", chosen, chunk_tokens=chunk_tokens)


def _options(options: str | Mapping[str, Any] | None, more: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options of both spellings."""
    try:
        chosen = json.loads(options) if isinstance(options, str) else dict(options or {})
    except json.JSONDecodeError as error:
        raise InputError(f"options={options!r} is not JSON: {error}") from error
    if not isinstance(chosen, dict):
        raise InputError(f"options={options!r} is not a JSON object")
    if unknown := sorted(key for key in more if not key.startswith("option_")):
        raise InputError(f"unknown model argument {', '.join(unknown)}; options of a method are option_NAME=VALUE")
    return chosen | {key.removeprefix("option_"): value for key, value in more.items()}

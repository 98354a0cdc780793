"""A run folder, read: its conditions, samples, summary rows and kept maps."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longfit.errors import InputError
from longfit.eval.conditions import read_config
from longfit.eval.summary import read_records, summarise


@dataclass(frozen=True)
class Run:
    """A run folder in memory.

    Attributes:
        config: of ``config.yaml``.
        environment: of all ``env*.json``: a key's value, or " / " between the values where shards differ.
        records: one dict a sample, of ``samples*.jsonl``.
        rows: of `longfit.eval.summary.summarise`: one a (model, length, cell, task), task "mean" for the mean.
        kept: one dict a sample with ``layers``, per cent of entries kept by layer and bin; often empty.
    """

    folder: Path
    config: dict[str, Any]
    environment: dict[str, str]
    records: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    kept: list[dict[str, Any]]


def load(folder: str | Path) -> Run:
    """Read a run.

    Raises:
        InputError: the folder is no run, a file in it is damaged, or no sample is finished.
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        records, costs = read_records(folder, "samples"), read_records(folder, "costs")
        if not records:
            raise InputError(f"{str(folder)!r} holds no finished sample yet")
        rows = summarise(records, costs)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"the samples in {str(folder)!r} are not of format 2 ({error!r}); run the sweep anew"
        ) from error
    return Run(folder, config, _environment(folder), records, rows, read_kept(folder))


def _environment(folder: Path) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for file in sorted(folder.glob("env*.json")):
        try:
            values = flatten(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, AttributeError) as error:
            raise InputError(f"{str(file)!r} is damaged: {error}") from error
        for key, value in values.items():
            found.setdefault(key, [])
            found[key] += [value] if value not in found[key] else []
    return {key: " / ".join(values) for key, values in found.items()}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as one, with dotted keys and every value as a text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def read_kept(folder: Path) -> list[dict[str, Any]]:
    """The kept maps of all shards; a last line without an end is still being written and does not count.

    Raises:
        InputError: a whole line is not a kept map.
    """
    found = []
    for file in sorted(folder.glob("kept*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
            try:
                record = json.loads(line)
                widths = {len(layer) for layer in record["layers"]}
                if len(widths) != 1 or not {"model", "length", "cell"} <= record.keys():
                    raise ValueError("its layers are unequal or its cell is not named")
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{file.name} line {number} is damaged ({error}); remove the line") from error
            found.append(record)
    return found


def conditions(run: Run) -> tuple[tuple[str, str], ...]:
    """What every figure of the run stands under, as names and values; only what the run recorded."""
    config = run.config
    counts = sorted({row["n"] for row in run.rows if row["task"] != "mean"})
    n = "-".join(f"{count}" for count in dict.fromkeys((counts[0], counts[-1]))) if counts else "0"
    asked = f" of {config['n']}" if "n" in config else ""
    aware = sorted({row["awareness"] for row in run.rows if row["method"] not in ("full", "no_context", "truncate")})
    items = [
        ("model", _joined(row["model"] for row in run.rows)),
        ("lengths", _joined(f"{row['length']:,}" for row in run.rows) + " tokens"),
        ("n", f"{n}{asked} samples finished in each cell and task"),
        ("question", ", ".join(f"question-{mode}" for mode in aware)),
    ]
    items += [(name, text(config[name])) for name in ("suite", "dtype", "seed", "decoding", "chat") if name in config]
    # Hashes stand at the top of the config, or by model and length.
    for place, found in [("", config), *(config.get("conditions") or {}).items()]:
        named = {key: found[key] for key in found if key.endswith("sha256") or (place and key == "dtype")}
        if place and named.get("chat_template_sha256", "") is None:
            named["chat_template_sha256"] = "none: the tokenizer has no chat template, prompts are plain text"
        items += [(key.replace("_", " ") + (f" ({place})" if place else ""), text(named[key])) for key in named]
    return tuple((name, value) for name, value in [*items, *run.environment.items()] if value)


def _joined(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def text(value: Any) -> str:
    """A value of the config in one line."""
    if isinstance(value, dict):
        return "; ".join(f"{key} {inner}" for key, inner in flatten(value).items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)

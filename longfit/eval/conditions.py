"""The conditions of a run: what decides its outcome, and what it ran on."""

import hashlib
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from longfit.errors import InputError
from longfit.eval.inputs import tokenizer_sha256
from longfit.eval.recipe import Recipe
from longfit.eval.sample import Sample

FORMAT = 2
PACKAGES = ("longfit", "torch", "transformers", "tokenizers", "numpy")
# May change between two starts of one run: none of them touches a finished sample.
FREE = {
    "name",
    "cells",
    "threads",
    "cost_samples",
    "fresh_process",
    "block_samples",
    "models",
    "lengths",
    "tasks",
    "conditions",
}


def conditions(model: Any, tokenizer: Any, samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """Of one model at one length: hashes of its weights, tokenizer, template and samples (by task)."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_sha256": _weights_sha256(model),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if template else None,
        "samples_sha256": {
            task: hashlib.sha256("".join(sample.sha256 for sample in given).encode()).hexdigest()
            for task, given in samples.items()
        },
    }


def _weights_sha256(model: Any) -> str:
    """A strided look at every tensor tells models apart without reading gigabytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)].float().cpu().tolist()
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype), values)).encode())
    return digest.hexdigest()


def resolved(recipe: Recipe, tasks: list[str]) -> dict[str, Any]:
    """The recipe as run, before anything is known of its models."""
    return asdict(recipe) | {"format": FORMAT, "tasks": tasks, "decoding": "greedy", "conditions": {}}


def read_config(folder: Path) -> dict[str, Any]:
    """A run's config.yaml.

    Raises:
        InputError: the folder holds no run, or one of another version of longfit's format.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise InputError(f"{str(folder)!r} is not a run folder: it has no config.yaml")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{str(file)!r} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format", 1) if isinstance(config, dict) else None
        raise InputError(
            f"{str(folder)!r} holds a run in format {found}, this longfit reads and writes {FORMAT}: give another "
            "folder, or use the version of longfit that made it"
        )
    return config


def merged(folder: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The config to write: the folder's own, grown by what `new` adds to it.

    Raises:
        InputError: the folder holds a run under other conditions, which are named.
    """
    if not (folder / "config.yaml").is_file():
        return new
    old = read_config(folder)
    changed = sorted(key for key in new if key not in FREE and old.get(key) != new[key])
    for place, given in new["conditions"].items():
        before = old["conditions"].get(place, given)
        changed += sorted(f"{key} of {place}" for key in given if key != "samples_sha256" and before[key] != given[key])
        tasks = given["samples_sha256"].items()
        changed += [f"samples of {t} in {place}" for t, h in tasks if before["samples_sha256"].get(t, h) != h]
    if changed:
        raise InputError(f"{str(folder)!r} holds a run with another {', '.join(changed)}; give another folder")
    places = dict(old["conditions"])
    for place, given in new["conditions"].items():
        hashes = places.get(place, given)["samples_sha256"] | given["samples_sha256"]
        places[place] = given | {"samples_sha256": hashes}
    grown = {key: [*old[key], *(x for x in new[key] if x not in old[key])] for key in ("models", "lengths", "tasks")}
    cells = [*old["cells"], *(group for group in new["cells"] if group not in old["cells"])]
    return new | grown | {"cells": cells, "conditions": places}


def environment(threads: int | None, device: str) -> dict[str, Any]:
    """What a run ran on."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }

"""Run a benchmark recipe: every cell in a fresh process, the systems in turn, resumable."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from longfit.bench.inputs import prepare_model, prepare_prompt
from longfit.bench.recipe import Recipe, read_recipe
from longfit.bench.table import Samples, summarise
from longfit.errors import InputError

KVPRESS_WORKER = Path(__file__).with_name("kvpress_worker.py")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run(
    recipe_path: str | Path,
    output: str | Path | None = None,
    data: str | Path | None = None,
    resume: bool = True,
) -> dict[str, Any]:
    """Run the recipe and return its summary (see `longfit.bench.table.summarise`) plus `folder`.

    Writes `config.yaml`, `env.json`, `samples.jsonl` (one line a cell, appended) and `metrics.json` to
    `output`, by default runs/bench/<name>. A cell that is done is skipped on the next call; one that failed
    or was skipped runs again. `data` is a folder of .txt books for the prompt. Progress goes to stderr.
    Raises `InputError` for a recipe or a folder that cannot be used.
    """
    recipe = read_recipe(recipe_path)
    data = None if data is None else str(data)
    folder = Path(output) if output is not None else Path("runs") / "bench" / recipe.name
    _open_folder(folder, recipe, data, resume)
    model_folder = prepare_model(recipe.model, folder)
    prompt = prepare_prompt(recipe.model, model_folder, max(recipe.lengths), folder, data)
    _write_environment(folder, recipe)

    samples = read_samples(folder)
    kvpress_python = find_kvpress_python(Path(recipe_path))
    cells = recipe.cells()
    for number, (system, length, repeat) in enumerate(cells, start=1):
        if samples.get((system, length, repeat), {}).get("status") == "done":
            continue
        key = {"system": system, "length": length, "repeat": repeat}
        cell = key | {
            "model_folder": model_folder,
            "prompt": str(prompt.resolve()),
            "measure": recipe.measure,
            "dtype": recipe.dtype,
            "threads": recipe.threads,
            "kept_tokens": recipe.kept_tokens,
            "new_tokens": recipe.new_tokens,
            "chunk_tokens": recipe.chunk_tokens,
            "prefill_chunk_size": recipe.prefill_chunk_size,
            "options": recipe.options.get(system, {}),
        }
        _say(f"[{number}/{len(cells)}] {system}, {length:,} tokens, run {repeat + 1} ...")
        sample = key | {"load_before": round(os.getloadavg()[0], 2)} | run_cell(cell, recipe, kvpress_python)
        samples[(system, length, repeat)] = sample
        with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(sample) + "\n")
        _say(f"    {_brief(sample)}")
    result = summarise(recipe, samples) | {"folder": str(folder)}
    _write(folder / "metrics.json", json.dumps(result, indent=2) + "\n")
    return result


def run_cell(cell: dict[str, Any], recipe: Recipe, kvpress_python: Path | None) -> dict[str, Any]:
    """One fresh process; its measurements with `status` done, or failed or skipped with a `reason`."""
    if cell["system"].startswith("kvpress:"):
        if kvpress_python is None:
            reason = "no kvpress environment: run recipes/kvpress/setup.sh or set LONGFIT_KVPRESS_PYTHON"
            return {"status": "skipped", "reason": reason}
        command = [str(kvpress_python), str(KVPRESS_WORKER)]
    else:
        command = [sys.executable, "-m", "longfit.bench.worker"]
    started = time.perf_counter()
    try:
        process = subprocess.run(
            [*command, json.dumps(cell)],
            env=_worker_environment(cell["system"], recipe),
            capture_output=True,
            text=True,
            timeout=recipe.timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"took longer than timeout_seconds ({recipe.timeout_seconds})"}
    wall = {"wall_seconds": round(time.perf_counter() - started, 3)}
    if process.returncode < 0:
        return {
            "status": "failed",
            "reason": f"killed by signal {-process.returncode} (out of memory?)",
        } | wall
    if process.returncode != 0:
        lines = [line for line in process.stderr.splitlines() if line.strip()]
        return {
            "status": "failed",
            "reason": lines[-1] if lines else f"exit code {process.returncode}",
        } | wall
    return {"status": "done"} | json.loads(process.stdout.splitlines()[-1]) | wall


def _worker_environment(system: str, recipe: Recipe) -> dict[str, str]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {name: str(recipe.threads) for name in THREAD_VARIABLES}
    environment |= {name: str(value) for name, value in recipe.environment.items()}
    source = str(Path(__file__).resolve().parents[2])
    if system.startswith("kvpress:"):
        environment.pop("PYTHONPATH", None)
    else:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH")]))
    return environment


def find_kvpress_python(recipe_path: Path) -> Path | None:
    """$LONGFIT_KVPRESS_PYTHON, else .venv-kvpress beside the recipe's or the current folder or above it."""
    if named := os.environ.get("LONGFIT_KVPRESS_PYTHON"):
        if not Path(named).is_file():
            raise InputError(f"LONGFIT_KVPRESS_PYTHON is {named}, which is not a file")
        return Path(named)
    for start in (Path.cwd(), recipe_path.resolve().parent):
        for folder in (start, *start.parents):
            candidate = folder / ".venv-kvpress" / "bin" / "python"
            if candidate.is_file():
                return candidate
    return None


def read_samples(folder: Path) -> Samples:
    """The last line of each cell in samples.jsonl; a line cut short by a kill is dropped from the file."""
    path = folder / "samples.jsonl"
    samples: Samples = {}
    if not path.exists():
        return samples
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        _write(path, text)
    for line in text.splitlines():
        sample = json.loads(line)
        samples[(sample["system"], sample["length"], sample["repeat"])] = sample
    return samples


def _open_folder(folder: Path, recipe: Recipe, data: str | None, resume: bool) -> None:
    config = recipe.to_dict() | {"data": data}
    path = folder / "config.yaml"
    if (folder / "samples.jsonl").exists() and not resume:
        raise InputError(f"{folder} holds a run already; choose another output folder or resume it")
    if path.exists() and yaml.safe_load(path.read_text(encoding="utf-8")) != config:
        raise InputError(f"{folder} holds a run of another recipe or data; choose another output folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, yaml.safe_dump(config, sort_keys=False))
    except OSError as error:
        raise InputError(f"cannot write to the output folder {folder}: {error}") from error


def _write_environment(folder: Path, recipe: Recipe) -> None:
    """Append what this call runs on, unless it is what the last one ran on."""
    ids = np.load(folder / "prompt_ids.npy")
    now = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "versions": {name: _version(name) for name in ("longfit", "torch", "transformers", "numpy")},
        "threads": recipe.threads,
        "environment": recipe.environment,
        "prompt_tokens": len(ids),
        "prompt_checksum": int(ids.astype(np.int64).sum()),
    }
    path = folder / "env.json"
    sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"] if path.exists() else []
    if not sessions or sessions[-1] != now:
        _write(path, json.dumps({"sessions": [*sessions, now]}, indent=2) + "\n")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _brief(sample: dict[str, Any]) -> str:
    if sample["status"] != "done":
        return f"{sample['status']}: {sample['reason']}"
    parts = [f"prefill {sample['prefill_seconds']:.2f} s"]
    if sample.get("decode_seconds_per_token") is not None:
        parts.append(f"decode {sample['decode_seconds_per_token'] * 1e3:.1f} ms/token")
    if "extra_peak_bytes" in sample:
        parts.append(f"extra peak {sample['extra_peak_bytes'] / 2**20:.0f} MiB")
    return ", ".join(parts)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

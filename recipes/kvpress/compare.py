"""kvpress on the samples of one of our sweeps: its answers become rows of the same run folder.

    python recipes/kvpress/compare.py recipes/ablations/ruler-2k.yaml -o runs/ruler-2k --data FOLDER \
        --presses knorm,snapkv,kvzip --keep-ratios 0.5,0.25,0.1

Run the sweep first, and setup.sh once. The presses answer in kvpress' own environment, from the same token ids, and
are scored here; `longfit report` then shows them as `kvpress:NAME`. Started again, it goes on where it was. Another
folder than the sweep's works too; samples-kvpress.jsonl can be copied into the sweep's later. Where the folder has a
config.yaml, samples and weights have to be those of its run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from longfit.bench.inputs import prepare_model
from longfit.bench.kvpress_worker import PRESSES
from longfit.bench.runner import find_kvpress_python
from longfit.errors import InputError
from longfit.eval import records
from longfit.eval.answering import record as record_of
from longfit.eval.cells import Cell
from longfit.eval.conditions import conditions, merged, resolved
from longfit.eval.measures import Outcome
from longfit.eval.recipe import Recipe
from longfit.eval.sample import Sample
from longfit.eval.suites import get_task
from longfit.eval.worker import all_samples, load_reader

ANSWER = Path(__file__).with_name("answer.py")
# Those with the same rule as one of ours; h2o's is another, and streaming_llm_rerotated is ours with its own numbering.
DEFAULT = (
    "random,streaming_llm,streaming_llm_rerotated,knorm,keydiff,lagkv,tova,snapkv,pyramidkv,adakv,chunkkv,"
    "expected_attention,finch,kvzip"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--data")
    parser.add_argument("--presses", default=DEFAULT)
    parser.add_argument("--keep-ratios", default="0.25")
    parser.add_argument("--limit", type=int, help="only the first samples of each task")
    given = parser.parse_args()
    recipe = Recipe.read(given.recipe)
    presses = given.presses.split(",")
    if unknown := sorted(set(presses) - set(PRESSES)):
        raise InputError(f"unknown press {', '.join(unknown)}; known: {', '.join(PRESSES)}")
    python = find_kvpress_python(given.recipe)
    if python is None:
        raise InputError("no kvpress environment: run recipes/kvpress/setup.sh")
    given.output.mkdir(parents=True, exist_ok=True)
    with records.locked(given.output, "-kvpress"):
        for model in recipe.models:
            reader = load_reader(recipe, model)
            folder = prepare_model(model, given.output)
            for length in recipe.lengths:
                by_task = all_samples(recipe, recipe.task_names(), length, reader.tokenizer, given.data)
                check_conditions(recipe, reader, given.output, f"{model}@{length}", by_task)
                samples = [s for group in by_task.values() for s in group[: given.limit]]
                cells = [
                    Cell(f"kvpress:{press}", f"{100 * float(ratio):g}%")
                    for press in presses
                    for ratio in given.keep_ratios.split(",")
                ]
                place = {"model": model, "length": length}
                for attention in sorted({PRESSES[press][2] for press in presses}, reverse=True):
                    mine = [cell for cell in cells if PRESSES[press_of(cell)][2] == attention]
                    run_cells(recipe, reader, mine, place, samples, given.output, python, folder, attention)


def press_of(cell: Cell) -> str:
    return cell.method.partition(":")[2]


def check_conditions(recipe: Recipe, reader: Any, output: Path, place: str, by_task: dict[str, list[Sample]]) -> None:
    """Write the folder's config.yaml where it has none.

    Raises:
        InputError: it has one of a run under other conditions.
    """
    config = resolved(recipe, recipe.task_names())
    config["conditions"][place] = conditions(reader.model, reader.tokenizer, by_task)
    grown = merged(output, config)
    if not (output / "config.yaml").is_file():
        records.write_atomically(output / "config.yaml", yaml.safe_dump(grown, sort_keys=False, allow_unicode=True))


def run_cells(
    recipe: Recipe,
    reader: Any,
    cells: list[Cell],
    place: dict[str, Any],
    samples: list[Sample],
    output: Path,
    python: Path,
    model_folder: str,
    attention: str,
) -> None:
    """The missing answers, sample by sample, in one process of kvpress' environment."""
    log_file = output / "samples-kvpress.jsonl"
    records.repair(log_file)
    done = {records.key_of(r) for r in records.read_records(output)}
    mark = (place["model"], place["length"])
    todo = {s.sample_id: [c for c in cells if (*mark, c.cell_id, s.sample_id) not in done] for s in samples}
    count = sum(map(len, todo.values()))
    if not count:
        return
    by_id, by_cell = {s.sample_id: s for s in samples}, {(press_of(c), c.keep_ratio): c for c in cells}
    with tempfile.TemporaryDirectory() as scratch:
        job = {
            "model_folder": model_folder,
            "dtype": str(reader.model.dtype).removeprefix("torch."),
            "attention": attention,
            "threads": recipe.threads or 1,
            "samples": str(Path(scratch) / "samples"),
        }
        lines = [json.dumps(_plain(recipe, by_id[name], missing)) for name, missing in todo.items() if missing]
        Path(job["samples"]).write_text("\n".join(lines))
        (Path(scratch) / "job").write_text(json.dumps(job))
        print(f"{place['model']}@{place['length']}: {count} answers", file=sys.stderr, flush=True)
        command = [str(python), str(ANSWER), str(Path(scratch) / "job")]
        answering = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with answering, log_file.open("a", encoding="utf-8") as log:
            assert answering.stdout is not None
            for line in map(json.loads, answering.stdout):
                sample, cell = by_id[line["sample"]], by_cell[tuple(line["cell"])]
                records.append(log, place | _scored(recipe, reader, cell, sample, line))
                count -= 1
        if answering.returncode or count:
            raise SystemExit(f"kvpress ended with status {answering.returncode}, {count} answers are left")


def _plain(recipe: Recipe, sample: Sample, cells: list[Cell]) -> dict[str, Any]:
    return {
        "sample": sample.sample_id,
        "context_ids": sample.context_ids,
        "question_ids": sample.question_ids,
        "answers": sample.answers,
        "metric": get_task(recipe.suite, sample.task).metric,
        "max_new_tokens": recipe.max_new_tokens or sample.max_new_tokens,
        "cells": [(press_of(cell), cell.keep_ratio) for cell in cells],
    }


def _scored(recipe: Recipe, reader: Any, cell: Cell, sample: Sample, line: dict[str, Any]) -> dict[str, Any]:
    outcome = Outcome(line["answer"], [], line["prefill_seconds"], line["decode_seconds"], line["new_tokens"])
    tokens = len(sample.context_ids)
    held = {"tokens_in": tokens, "kept_tokens": line["kept_tokens"], "kv_bytes": line["kv_bytes"]}
    # Another process and environment: its times do not belong beside ours, so they count as shared.
    more = {"full_kv_bytes": reader.full_kv_bytes(tokens), "peak_bytes": None, "shared_prefill": True}
    more |= {"read_bytes_per_token": None}
    return record_of(get_task(recipe.suite, sample.task), sample, cell, outcome) | held | more


if __name__ == "__main__":
    main()

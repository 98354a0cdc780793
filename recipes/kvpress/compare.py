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
                for press in presses:
                    for ratio in map(float, given.keep_ratios.split(",")):
                        cell = Cell(f"kvpress:{press}", f"{100 * ratio:g}%")
                        place = {"model": model, "length": length}
                        run_cell(recipe, reader, cell, place, samples, given.output, python, folder)


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


def run_cell(
    recipe: Recipe,
    reader: Any,
    cell: Cell,
    place: dict[str, Any],
    samples: list[Sample],
    output: Path,
    python: Path,
    model_folder: str,
) -> None:
    """The missing samples of one cell, in one process of kvpress' environment."""
    log_file = output / "samples-kvpress.jsonl"
    records.repair(log_file)
    done = {records.key_of(r) for r in records.read_records(output)}
    todo = [s for s in samples if (place["model"], place["length"], cell.cell_id, s.sample_id) not in done]
    if not todo:
        return
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: str(Path(scratch) / name) for name in ("samples", "job")}
        Path(files["samples"]).write_text("".join(json.dumps(_plain(recipe, s)) + "\n" for s in todo))
        job = {
            "model_folder": model_folder,
            "press": cell.method.partition(":")[2],
            "keep_ratio": cell.keep_ratio,
            "options": {},
            "dtype": str(reader.model.dtype).removeprefix("torch."),
            "threads": recipe.threads or 1,
            "samples": files["samples"],
        }
        Path(files["job"]).write_text(json.dumps(job))
        print(f"{cell.cell_id}: {len(todo)} samples", file=sys.stderr, flush=True)
        by_id = {s.sample_id: s for s in todo}
        answering = subprocess.Popen([str(python), str(ANSWER), files["job"]], stdout=subprocess.PIPE, text=True)
        with answering, log_file.open("a", encoding="utf-8") as log:
            assert answering.stdout is not None
            for line in map(json.loads, answering.stdout):
                records.append(log, place | _scored(recipe, reader, cell, by_id.pop(line["sample"]), line))
        if answering.returncode:
            raise SystemExit(f"{cell.cell_id} failed, {len(by_id)} of {len(todo)} samples are left")


def _plain(recipe: Recipe, sample: Sample) -> dict[str, Any]:
    return {
        "sample": sample.sample_id,
        "context_ids": sample.context_ids,
        "question_ids": sample.question_ids,
        "answers": sample.answers,
        "metric": get_task(recipe.suite, sample.task).metric,
        "max_new_tokens": recipe.max_new_tokens or sample.max_new_tokens,
    }


def _scored(recipe: Recipe, reader: Any, cell: Cell, sample: Sample, line: dict[str, Any]) -> dict[str, Any]:
    outcome = Outcome(line["answer"], [], line["prefill_seconds"], line["decode_seconds"], line["new_tokens"])
    tokens = len(sample.context_ids)
    held = {"tokens_in": tokens, "kept_tokens": line["kept_tokens"], "kv_bytes": line["kv_bytes"]}
    # Another process and environment: its times do not belong beside ours, so they count as shared.
    more = {"full_kv_bytes": reader.full_kv_bytes(tokens), "peak_bytes": None, "shared_prefill": True}
    return record_of(get_task(recipe.suite, sample.task), sample, cell, outcome) | held | more


if __name__ == "__main__":
    main()

"""Our samples as tasks of lm-eval, scored by its own RULER functions."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from longfit.eval.sample import Sample

METRIC = "from lm_eval.tasks.ruler.common_utils import aggregate_metrics, process_results, process_results_part\n"
TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{input}}",
    "doc_to_target": "{{outputs}}",
    "gen_prefix": "{{gen_prefix}}",
}


def write_task(
    folder: Path, name: str, samples: Sequence[Sample], prefix: str, length: int, new_tokens: int, scorer: str
) -> None:
    """``name``.yaml with the samples beside it.

    Args:
        prefix: how the answer prefix begins; lm-eval wants it apart from the prompt.
        length: the samples' length, which names lm-eval's metric.
        scorer: ``process_results`` or ``process_results_part``.
    """
    lines = []
    for sample in samples:
        at = sample.prompt.question.rindex(prefix)
        given = sample.prompt.context + sample.prompt.question[:at]
        line = {"input": given, "gen_prefix": sample.prompt.question[at:], "outputs": list(sample.answers)}
        lines.append(json.dumps(line | {"max_length": length}) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "utils.py").write_text(METRIC)
    how = {"do_sample": False, "max_gen_toks": new_tokens, "until": []}
    files = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
    text = yaml.safe_dump(TASK | {"task": name, "generation_kwargs": how, "dataset_kwargs": files})
    text += f"process_results: !function utils.{scorer}\nmetric_list:\n  - metric: '{length}'\n"
    text += "    aggregation: !function utils.aggregate_metrics\n    higher_is_better: true\n"
    (folder / f"{name}.yaml").write_text(text)

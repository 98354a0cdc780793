"""Runs NVIDIA's RULER generators and keeps one SHA-256 a sample, for tests/test_ruler.py. See README.md beside it."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from transformers import AutoTokenizer

INPUTS = ("PaulGrahamEssays.json", "squad.json", "hotpotqa.json", "english_words.json")
PLACE = "{task_template}"


def model_template(tokenizer_folder: Path) -> str:
    """The entry that `template.py` would have for this tokenizer: its chat template round one user turn, or `base`."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if not tokenizer.chat_template:
        return PLACE
    turn = [{"role": "user", "content": PLACE}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def original(
    synthetic: Path, tokenizer: Path, task: str, length: int, n: int, template: str, out: Path, limit_seconds: int
) -> list[dict[str, object]]:
    """The samples of NVIDIA's generator as its jsonl has them, or none where it did not end in time."""
    sys.path.insert(0, str(synthetic))
    from constants import TASKS  # RULER's own templates

    config = yaml.safe_load((synthetic.parents[1] / "synthetic.yaml").read_text())[task]
    base = TASKS[config["task"]]
    whole = template.replace(PLACE, base["template"]) + base["answer_prefix"]
    command = [sys.executable, f"{config['task']}.py", "--save_dir", str(out), "--save_name", f"{task}-{length}"]
    command += ["--tokenizer_type", "hf", "--tokenizer_path", str(tokenizer), "--max_seq_length", str(length)]
    command += ["--tokens_to_generate", str(base["tokens_to_generate"]), "--num_samples", str(n), "--template", whole]
    command += [f"--{key}={value}" for key, value in config["args"].items()]
    try:
        subprocess.run(command, cwd=synthetic, check=True, stderr=subprocess.DEVNULL, timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        return []
    lines = (out / f"{task}-{length}" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def repaired(row: dict[str, object], template: str) -> str:
    """The whole text, with the words of the chat template as they were: niah.py turns its "are" into "is" as well."""
    text = f"{row['input']}{row['answer_prefix']}"
    opening = template.partition(PLACE)[0]
    spoilt = opening.replace("Some", "A").replace("are all", "is").replace("are", "is").replace("answers", "answer")
    return opening + text[len(spoilt) :] if text.startswith(spoilt) else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ruler", type=Path, required=True, help="checkout of NVIDIA/RULER")
    parser.add_argument("--data", type=Path, required=True, help="folder with " + ", ".join(INPUTS) + " and nltk_data")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--base", action="store_true", help="without the tokenizer's chat template")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--tasks", nargs="+", help="default: all 13")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--limit-seconds", type=int, default=60, help="for a generator that never ends")
    parser.add_argument("--keep", type=Path, required=True, help="folder for the generators' own jsonl")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    synthetic = (args.ruler / "scripts" / "data" / "synthetic").resolve()
    for name in INPUTS:
        shutil.copyfile(args.data / name, synthetic / "json" / name)
    os.environ["NLTK_DATA"] = str((args.data / "nltk_data").resolve())
    template = PLACE if args.base else model_template(args.tokenizer)
    tasks = args.tasks or list(yaml.safe_load((synthetic.parents[1] / "synthetic.yaml").read_text()))
    fixture: dict[str, dict[str, list[str]]] = {}
    for task in tasks:
        for length in args.lengths:
            where = (args.keep.resolve(), args.limit_seconds)
            rows = original(synthetic, args.tokenizer.resolve(), task, length, args.samples, template, *where)
            held = [json.dumps([repaired(row, template), row["outputs"]], ensure_ascii=False) for row in rows]
            sums = [hashlib.sha256(text.encode()).hexdigest() for text in held]
            fixture.setdefault(task, {})[str(length)] = sums
            print(task, length, len(rows), file=sys.stderr)
    args.out.write_text(json.dumps(fixture, indent=1) + "\n")


if __name__ == "__main__":
    main()

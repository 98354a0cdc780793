"""How much a few memory vectors can hold at all: cramming, the ceiling of every method whose slots are embeddings.

    python recipes/learned/capacity.py --data FOLDER -o docs/learned/capacity --lengths 16 32 64 --vectors 1 4

For each length, texts of held-out wikitext and of random words are optimised into so many vectors, the model frozen
(Kuratov et al. 2025, section 3). The lengths of one number of vectors go up until less than half of the tokens are
decoded. Lines are appended to fits.jsonl as they are done; started again, it goes on. capacity.md has the table.

FOLDER holds text/wiki/wikitext2_raw_test.jsonl and ruler/english_words.json.
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import longfit
from longfit.compressors import available_soft
from longfit.compressors.soft.capacity import Fit, decoding_capacity, information_gain, measure, token_gain
from longfit.compressors.soft.cramming import Cramming
from longfit.training.data.documents import tokens_of
from longfit.training.files import append_line, write_whole

MOST_LOST = 0.5


def texts(kind: str, tokens: int, n: int, tokenizer: Any, data: Path) -> Tensor:
    """ids [n, tokens]: starts of held-out articles, or random words of English."""
    drawn, rows = random.Random(f"{kind}/{tokens}"), []
    if kind == "wikitext":
        lines = (data / "text/wiki/wikitext2_raw_test.jsonl").read_text(encoding="utf-8").splitlines()
        whole = [tokens_of(tokenizer, json.loads(line)["text"].strip()) for line in lines]
        rows = drawn.sample([ids[:tokens] for ids in whole if len(ids) >= tokens], n)
    else:
        given = json.loads((data / "ruler/english_words.json").read_text(encoding="utf-8"))
        words = sorted(given.values() if isinstance(given, dict) else given)
        rows = [tokens_of(tokenizer, " ".join(drawn.sample(words, tokens)))[:tokens] for _ in range(n)]
    return torch.tensor(rows)


def missing(fits: list[dict[str, Any]], asked: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """Kind, vectors and length of what is still to be measured."""
    for kind in ("wikitext", "words"):
        for vectors in asked.vectors:
            for tokens in asked.lengths:
                found = [fit["accuracy"] for fit in fits if same(fit, kind, vectors, tokens)]
                if len(found) < asked.n:
                    yield kind, vectors, tokens
                    found = [fit["accuracy"] for fit in fits if same(fit, kind, vectors, tokens)]
                if fmean(found) < MOST_LOST:
                    break


def same(fit: dict[str, Any], kind: str, vectors: int, tokens: int) -> bool:
    return (fit["text"], fit["vectors"], fit["length"]) == (kind, vectors, tokens)


def table(fits: list[dict[str, Any]], steps: int) -> str:
    """Accuracy by length, and the three figures of the paper."""
    lengths = sorted({fit["length"] for fit in fits})
    lines = [f"At most {steps} steps; accuracy (teacher-forced) of tokens 2 to N, mean of the texts.", ""]
    lines += [
        "| text | vectors | " + " | ".join(f"{n} tokens" for n in lengths) + " | capacity | tokens gained | nats |"
    ]
    lines += ["|---|--:|" + "--:|" * (len(lengths) + 3)]
    for kind, vectors in dict.fromkeys((fit["text"], fit["vectors"]) for fit in fits):
        own = {n: [fit for fit in fits if same(fit, kind, vectors, n)] for n in lengths}
        made = [Fit(**{key: fit[key] for key in Fit.__dataclass_fields__}) for given in own.values() for fit in given]
        gain = information_gain(made)
        shown = [f"{fmean(fit['accuracy'] for fit in given):.2f}" if given else "" for given in own.values()]
        capacity = decoding_capacity({n: [fit["accuracy"] for fit in given] for n, given in own.items()})
        nats = "all fit" if gain is None else f"{gain:.0f}"
        lines.append(f"| {kind} | {vectors} | {' | '.join(shown)} | {capacity} | {token_gain(made):.1f} | {nats} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 4])
    parser.add_argument("-n", type=int, default=4, help="texts of each kind and length, optimised together")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--patience", type=int, default=2000)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    log = asked.output / "fits.jsonl"
    fits = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    model, tokenizer = longfit.load(asked.model, dtype=torch.bfloat16)
    method = available_soft()["cramming"](steps=asked.steps, patience=asked.patience).bind(model.requires_grad_(False))
    assert isinstance(method, Cramming)
    for kind, vectors, tokens in missing(fits, asked):
        for fit in measure(method, texts(kind, tokens, asked.n, tokenizer, asked.data), vectors):
            line = {"text": kind, "vectors": vectors, "length": tokens, **asdict(fit), "accuracy": fit.accuracy}
            fits.append(line)
            append_line(log, line)
        print(f"{kind}, {vectors} vectors, {tokens} tokens: {fmean(f['accuracy'] for f in fits[-asked.n :]):.2f}")
    write_whole(asked.output / "capacity.md", table(fits, asked.steps))
    print(table(fits, asked.steps))


if __name__ == "__main__":
    main()

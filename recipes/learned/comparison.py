"""Every trained method beside truncation and pruning, at equal slots and at equal bytes, on what the training measures.

    python recipes/learned/comparison.py --data FOLDER -o docs/learned/comparison \
        strided_kv=smollm2-135m-strided-kv-4x gist=runs/gist/adapter ...

One condition after another reads the same episodes of documents that were never trained on: held-out lookups, held-out
text, SQuAD questions (the answer's likelihood, and F1 of what is decoded greedily). FOLDER holds
text/wiki/wikitext2_raw_{validation,test}.jsonl and ruler/squad.json. Scores of every sample are appended to
samples.jsonl; started again, it goes on. comparison.md has the tables.

A learned memory of M slots stands beside truncation to the last M tokens and pruning methods that keep M entries (equal
slots: an equal cache once it is read), and beside another document's memory. Slots that are embeddings are a 20th of
that in a file; truncation, and pruning methods that can keep so few, at those bytes are the conditions ending in "at
soft bytes".
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import longfit
from longfit.compressors import available_soft, get
from longfit.compressors.soft import LearnedCompressor, artifact
from longfit.eval.intervals import mean_interval, paired_difference
from longfit.eval.longbench.metrics import qa_f1
from longfit.families import model_shape
from longfit.training.batches import Batch, collate, evaluation_episodes
from longfit.training.data import Episode, sources
from longfit.training.evaluate import normalised, scored, sets_of

PRUNING: dict[str, dict[str, Any]] = {
    "kvzip": {},
    "snapkv": {"window": 16},
    "expected_attention": {"future_tokens": 64},
    "keydiff": {},
    "streaming_llm": {},
}
ANSWER_TOKENS, BATCH, TARGET = 8, 8, 80
WIKI = "text/wiki/wikitext2_raw_{}.jsonl"
TEXTS = {"files": WIKI.format("validation"), "eval_files": WIKI.format("test")}
KINDS = ("word", "name", "number", "code", "pin")
SOURCES: list[dict[str, Any]] = [
    {"kind": "lookup", "kinds": dict.fromkeys(KINDS, 1), "facts": 12, "asked": 12, **TEXTS},
    {"kind": "text", **TEXTS},
    {"kind": "squad"},
]
# From contexts [B, n], and those of other documents, to a function from what follows [B, T] to its logits.
Reads = Callable[[Tensor], Tensor]
Condition = Callable[[Tensor, Tensor], Reads]
Scores = dict[str, list[float]]  # of each sample, by condition


def plain(model: Any, tokens: int | None) -> Condition:
    """The base model after the last `tokens` tokens of the context; after all of them where None."""

    def condition(context: Tensor, other: Tensor) -> Reads:
        kept = context if tokens is None else context[:, context.shape[1] - tokens :]

        def read(ids: Tensor) -> Tensor:
            given = model(torch.cat([kept, ids], 1), use_cache=False)
            return given.logits[:, kept.shape[1] : -1]

        return read

    return condition


@contextmanager
def wrapped(model: Any, method: str, tokens: int) -> Iterator[Any]:
    """The model with a pruning method that keeps so many entries; what is asked is read in one chunk, whole."""
    yield longfit.wrap(model, method, budget=f"{tokens} tokens", chunk_tokens=1024, **PRUNING[method])
    longfit.unwrap(model)


def pruned(model: Any, method: str, tokens: int) -> Condition:
    """The model after what a pruning method keeps of the context, without a look at the question."""

    def condition(context: Tensor, other: Tensor) -> Reads:
        with wrapped(model, method, tokens):
            memory = model.compress(context)

        def read(ids: Tensor) -> Tensor:
            with wrapped(model, method, tokens):
                return model(input_ids=ids, past_key_values=memory.fork(memory.fingerprint)).logits[:, :-1]

        return read

    return condition


@contextmanager
def trained(model: Any, adapter: str) -> Iterator[LearnedCompressor]:
    """A learned method with its weights; the model is itself again afterwards."""
    compressor = available_soft()[artifact.find(adapter).facts["method"]](adapter=adapter).bind(model)
    try:
        yield compressor
    finally:
        compressor.release()


@contextmanager
def learned(model: Any, adapter: str, shuffled: bool = False) -> Iterator[Condition]:
    """A learned memory of the context, or of another one."""
    with trained(model, adapter) as compressor:

        def condition(context: Tensor, other: Tensor) -> Reads:
            encoded = compressor.compress(other if shuffled else context)
            return lambda ids: compressor.read(encoded, ids)

        yield condition


def greedy(read: Reads, ids: Tensor, tokenizer: Any) -> str:
    """Up to ANSWER_TOKENS tokens after ids [1, T], to the end of the line."""
    start = ids.shape[1]
    for _ in range(ANSWER_TOKENS):
        padded = torch.cat([ids, ids[:, -1:]], 1)  # `read` predicts ids[:, 1:]: one more, for what follows the last
        chosen = read(padded)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, chosen], 1)
        if "\n" in tokenizer.decode(chosen[0]):
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def samples(condition: Condition, episodes: list[Episode], tokenizer: Any, decode: bool) -> list[dict[str, Any]]:
    """Scores of each episode: nll, accuracy where there are answers, f1 where something is decoded."""
    others, rows = [*episodes[1:], episodes[0]], []
    for start in range(0, len(episodes), BATCH):
        batch = collate(episodes[start : start + BATCH])
        other = collate(others[start : start + BATCH])
        read = condition(batch.context, other.context)
        nll, right = scored(read(batch.ids), batch.ids[:, 1:], batch.weights[:, 1:], batch.answers[:, 1:])
        for row in range(len(nll)):
            rows.append(dict[str, Any](nll=nll[row]) | ({"accuracy": right[row]} if right else {}))
        if decode:
            for row in range(len(nll)):
                alone = condition(batch.context[row : row + 1], other.context[row : row + 1])
                question, gold = parts(batch, row)
                said = greedy(alone, question[None], tokenizer)
                rows[start + row] |= {"f1": qa_f1(said, tokenizer.decode(gold)), "said": said}
    return rows


def parts(batch: Batch, row: int) -> tuple[Tensor, Tensor]:
    """The question, and the ids of its answer."""
    answer = batch.answers[row].nonzero()[:, 0]
    return batch.ids[row, : int(answer[0])], batch.ids[row, answer]


class Log:
    """samples.jsonl: what was scored, and what has been already."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "samples.jsonl"
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        self.rows = [json.loads(line) for line in lines if line.endswith("}")]

    def has(self, key: dict[str, Any], n: int) -> bool:
        found = [row for row in self.rows if key.items() <= row.items()]
        return len(found) >= n

    def add(self, key: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        made = [{**key, "sample": index, **row} for index, row in enumerate(rows)]
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in made))
        self.rows += made


def conditions(
    model: Any, adapters: dict[str, str], tokens: int, pruning: list[str]
) -> dict[str, AbstractContextManager[Condition]]:
    """Each condition by name; learned ones are in the model inside their `with`."""
    probe, entry, sizes = torch.zeros(1, tokens, dtype=torch.long), model_shape(model).full_kv_bytes(1), {}
    for name, adapter in adapters.items():
        with trained(model, adapter) as compressor:
            encoded = compressor.compress(probe)
            sizes[name] = encoded.slots, encoded.nbytes
    slots = max(slots for slots, _ in sizes.values())
    few = min(nbytes for _, nbytes in sizes.values()) // entry
    simple = {"whole context": plain(model, None), "no context": plain(model, 0), "truncation": plain(model, slots)}
    if 0 < few < slots:
        simple["truncation at soft bytes"] = plain(model, few)
        able = [method for method in pruning if get(method, **PRUNING[method]).min_tokens <= few]
        simple |= {f"{method} at soft bytes": pruned(model, method, few) for method in able}
    simple |= {method: pruned(model, method, slots) for method in pruning}
    made: dict[str, AbstractContextManager[Condition]] = {name: nullcontext(given) for name, given in simple.items()}
    for name, adapter in adapters.items():
        made[name] = learned(model, adapter)
        made[f"{name}, another's"] = learned(model, adapter, shuffled=True)
    print(f"{tokens} tokens: {slots} slots; " + ", ".join(f"{name} {size:,} B" for name, (_, size) in sizes.items()))
    return made


def tables(rows: list[dict[str, Any]], tokens: int) -> str:
    """Each set's scores, a line a condition: as they are, normalised, and less truncation, paired."""
    sets = [(f"lookup/{kind}", "accuracy") for kind in KINDS] + [("text", "nll"), ("squad", "nll"), ("squad", "f1")]
    given: dict[str, Scores] = {}
    for row in rows:
        for name, metric in sets:
            if row["tokens"] == tokens and row["set"] == name and metric in row:
                given.setdefault(f"{name} {metric}", {}).setdefault(row["condition"], []).append(row[metric])
    names = list(dict.fromkeys(row["condition"] for row in rows if row["tokens"] == tokens))
    lines = [f"## {tokens} tokens"]
    for head, shown in (
        ("Mean [95 %]", score),
        ("(It - no context) / (whole context - no context) [95 %], where the context gains a tenth or more", share),
        ("Less truncation to as many tokens, the same samples [95 %] (for nll below 0 is better)", less),
    ):
        lines += [f"\n{head}\n", "| | " + " | ".join(given) + " |", "|---|" + "--:|" * len(given)]
        lines += [
            "| "
            + " | ".join([name, *(shown(scores, name) if name in scores else "" for scores in given.values())])
            + " |"
            for name in names
        ]
    return "\n".join(lines) + "\n"


def score(scores: Scores, name: str) -> str:
    mean, low, high = mean_interval(scores[name])
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def share(scores: Scores, name: str) -> str:
    whole, nothing = scores["whole context"], scores["no context"]
    if abs(np.mean(whole) - np.mean(nothing)) < 0.1:
        return ""
    value, low, high = normalised({"full": whole, "no_context": nothing, "it": scores[name]}, "it")
    return "" if value is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def less(scores: Scores, name: str) -> str:
    if name == "truncation":
        return ""
    mean, low, high = paired_difference(scores[name], scores["truncation"])
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", help="what to call it=a folder, or a name that longfit ships")
    parser.add_argument("--data", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256])
    parser.add_argument("-n", type=int, default=32)
    parser.add_argument("--pruning", nargs="*", default=list(PRUNING), choices=list(PRUNING))
    asked = parser.parse_args()
    adapters = dict(pair.split("=", 1) for pair in asked.adapters)
    model, tokenizer = longfit.load(asked.model, dtype=torch.bfloat16)
    sets, log = sets_of([source for _, source in sources(SOURCES, tokenizer, asked.data)]), Log(asked.output)
    for tokens in asked.tokens:
        for name, held in conditions(model, adapters, tokens, asked.pruning).items():
            left = [kind for kind in sets if not log.has({"tokens": tokens, "set": kind, "condition": name}, asked.n)]
            if not left:
                continue
            with held as condition:
                for kind in left:
                    episodes = evaluation_episodes(sets[kind], asked.n, tokens, TARGET)
                    key = {"tokens": tokens, "set": kind, "condition": name}
                    log.add(key, samples(condition, episodes, tokenizer, decode=kind == "squad"))
            print(f"{tokens} tokens, {name}: done", flush=True)
    text = "\n".join(tables(log.rows, tokens) for tokens in asked.tokens)
    (asked.output / "comparison.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""Train Sentinel's probe: a logistic regression over the attention of a small proxy model's last token.

    python recipes/prompt/train_sentinel_probe.py --data FOLDER --output probe.json [--model smollm2-135m]

FOLDER holds squad.json (SQuAD 2.0's format) and hotpotqa.json (the distractor setting's), as RULER downloads them.
Needs scikit-learn. The probe is then `--option probe=probe.json`, or ships with the package in
longfit/compressors/prompt/probes.

A sentence is needed if it holds the answer (SQuAD) or is a supporting fact (HotpotQA). Half of the articles, by a hash
of their titles, are for training and the others held out; a HotpotQA question is used only where all the paragraphs
that it stands beside (its own and two distractors) lie in one half. Half of the time goes to each.

Source: Zhang et al. 2025, Sentinel. There 3,000 questions are first filtered to those that the proxy answers right with
the text and wrong without it; here they are not.
"""

import argparse
import hashlib
import json
import random
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler

import longfit
from longfit.bm25 import BM25Index
from longfit.compressors.prompt.lm import LanguageModel
from longfit.compressors.prompt.passage import Passage
from longfit.compressors.prompt.probe import Probe, hash_of, sentence_features
from longfit.compressors.prompt.units import sentences


class Asked(NamedTuple):
    """A text as sentences, the questions that it answers, and for each the sentences that are needed."""

    source: str
    text: list[str]
    questions: list[str]
    needed: list[list[bool]]


def half(title: str) -> str:
    return "train" if hashlib.sha256(title.encode()).digest()[0] % 2 else "held out"


def squad(file: Path, part: str, tokenizer, rng: random.Random) -> Iterator[Asked]:
    """Paragraphs in random order, with up to four questions each."""
    articles = json.loads(file.read_text(encoding="utf-8"))["data"]
    paragraphs = [p for article in articles if half(article["title"]) == part for p in article["paragraphs"]]
    rng.shuffle(paragraphs)
    for paragraph in paragraphs:
        text = paragraph["context"].strip()
        passage = Passage.of(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
        units = sentences(passage, [True] * len(passage))
        spans = [(passage.starts[unit.first], passage.stops[unit.stop - 1]) for unit in units]
        answerable = [qa for qa in paragraph["qas"] if qa["answers"] and not qa.get("is_impossible")]
        asked = rng.sample(answerable, min(4, len(answerable)))
        needed = [[_holds(span, qa["answers"]) for span in spans] for qa in asked]
        kept = [(qa["question"], marks) for qa, marks in zip(asked, needed, strict=True) if any(marks)]
        if len(units) > 1 and kept:
            said = [text[start:stop] for start, stop in spans]
            yield Asked("squad", said, [question for question, _ in kept], [marks for _, marks in kept])


def _holds(span: tuple[int, int], answers: list[dict]) -> bool:
    return any(span[0] <= a["answer_start"] and a["answer_start"] + len(a["text"]) <= span[1] for a in answers)


def hotpot(file: Path, part: str, rng: random.Random) -> Iterator[Asked]:
    """Questions in random order, each beside its own paragraphs and two distractors, shuffled."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    rng.shuffle(rows)
    for row in rows:
        if any(len(fact) != 2 or not isinstance(fact[1], int) for fact in row["supporting_facts"]):
            continue  # rebuilt rows tell their facts otherwise
        facts = {(title, at) for title, at in row["supporting_facts"]}
        gold = {title for title, _ in facts}
        mine = [paragraph for paragraph in row["context"] if half(paragraph[0]) == part]
        if not gold <= {paragraph[0] for paragraph in mine}:
            continue
        others = [paragraph for paragraph in mine if paragraph[0] not in gold]
        chosen = [p for p in mine if p[0] in gold] + rng.sample(others, min(2, len(others)))
        rng.shuffle(chosen)
        text = [f" {said.strip()}" for _, said_there in chosen for said in said_there]
        marks = [(title, at) in facts for title, said_there in chosen for at in range(len(said_there))]
        if any(marks) and not all(marks):
            yield Asked("hotpotqa", text, [row["question"]], [marks])


def collect(lm: LanguageModel, texts: Iterator[Asked], seconds: float, most: int) -> list[dict]:
    """Features, labels and BM25 scores of each question, until the time or the number is up."""
    found, ends = [], time.monotonic() + seconds
    for given in texts:
        ids = [lm.encode(said) or [0] for said in given.text]
        features = sentence_features(lm, ids, given.questions)
        for question, marks, row in zip(given.questions, given.needed, features, strict=True):
            found.append(
                {
                    "source": given.source,
                    "features": row.numpy(),
                    "labels": np.array(marks),
                    "bm25": np.array(BM25Index(given.text).scores(question)),
                    "tokens": np.array([len(i) for i in ids]),
                }
            )
        if time.monotonic() > ends or len(found) >= most:
            break
    return found


def both(file: Path, part: str, tokenizer, rng: random.Random) -> Iterator[Asked]:
    """Three paragraphs of SQuAD for each question of HotpotQA."""
    one, two = squad(file / "squad.json", part, tokenizer, rng), hotpot(file / "hotpotqa.json", part, rng)
    groups = (chain((next(one, None) for _ in range(3)), (next(two, None),)) for _ in range(10**6))
    for group in groups:
        rows = [row for row in group if row is not None]
        if not rows:
            return
        yield from rows


def quality(rows: list[dict], score) -> dict[str, float]:
    """Mean over questions of the AUC among a question's sentences, and how often the first is a needed one."""
    aucs, firsts = [], []
    for row in rows:
        if row["labels"].all() or not row["labels"].any():
            continue
        scores = score(row)
        aucs.append(roc_auc_score(row["labels"], scores))
        firsts.append(bool(row["labels"][int(np.argmax(scores))]))
    n = len(aucs)
    return {
        "auc": round(float(np.mean(aucs)), 4),
        "auc_95": round(1.96 * float(np.std(aucs)) / n**0.5, 4),
        "first_is_needed": round(float(np.mean(firsts)), 4),
        "questions": n,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--minutes", type=float, default=12.0, help="for reading, training and held-out together")
    parser.add_argument("--most", type=int, default=3000, help="questions to train on")
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args()

    model, tokenizer = longfit.load(given.model, dtype=given.dtype)
    lm, rng = LanguageModel(model, tokenizer), random.Random(given.seed)
    parts = {}
    with torch.no_grad():
        for part, share in (("train", 0.6), ("held out", 0.4)):
            texts = both(given.data, part, tokenizer, rng)
            parts[part] = collect(lm, texts, 60 * given.minutes * share, given.most)
            print(f"{part}: {len(parts[part])} questions", flush=True)
    train, held = parts["train"], parts["held out"]

    scaler = StandardScaler().fit(np.concatenate([row["features"] for row in train]))
    x = scaler.transform(np.concatenate([row["features"] for row in train]))
    y = np.concatenate([row["labels"] for row in train])
    plain = LogisticRegression(class_weight="balanced", solver="liblinear")
    search = GridSearchCV(plain, {"C": np.logspace(-5, 1, 13)}, cv=5, scoring="roc_auc").fit(x, y)
    fitted = search.best_estimator_
    probe = Probe(
        layers=int(lm.config.num_hidden_layers),
        heads=int(lm.config.num_attention_heads),
        weights_hash=hash_of(model),
        mean=torch.tensor(scaler.mean_, dtype=torch.float32),
        scale=torch.tensor(scaler.scale_, dtype=torch.float32),
        weights=torch.tensor(fitted.coef_[0], dtype=torch.float32),
        bias=float(fitted.intercept_[0]),
    )
    ways = {
        "probe": lambda row: probe.score(torch.from_numpy(row["features"])).numpy(),
        "mean attention": lambda row: row["features"].mean(1),
        "bm25": lambda row: row["bm25"],
        "length": lambda row: row["tokens"],
    }
    results = {
        source: {name: quality([r for r in held if source in ("all", r["source"])], way) for name, way in ways.items()}
        for source in ("all", "squad", "hotpotqa")
    }
    probe.about.update(
        model=given.model,
        trained_on={
            "questions": len(train),
            "sentences": len(y),
            "needed": int(y.sum()),
            "sources": {name: sum(r["source"] == name for r in train) for name in ("squad", "hotpotqa")},
            "articles": "half of SQuAD 2.0 dev and HotpotQA dev distractor, by a hash of the titles",
        },
        held_out=results,
        C=float(search.best_params_["C"]),
        seed=given.seed,
        dtype=str(model.dtype).removeprefix("torch."),
    )
    probe.save(given.output)
    print(json.dumps(probe.about, indent=1))


if __name__ == "__main__":
    main()

"""How often the cited passage is the one that holds the answer, against BM25's first passage.

    python recipes/docqa/citations.py --data FOLDER -o runs/citations --answers gold,own --sets squad,hotpotqa,longbench
    python recipes/docqa/citations.py -o runs/citations --table

FOLDER holds `ruler/squad.json` (SQuAD 2.0 dev), `ruler/hotpotqa.json` (HotpotQA dev, distractor) and
`longbench/*.jsonl`. Each question is asked to a long document: a whole SQuAD article, all paragraphs of a HotpotQA
context, the context of a LongBench row. The gold passages are those that overlap the answer (SQuAD) or a supporting
sentence (HotpotQA); LongBench does not say, and there a passage is counted that holds the answer's words in a row.

With `gold` the citations are of the dataset's answer, with `own` of what the model itself says from a SnapKV memory of
a quarter of the cache. Every row is written as it is done, with all candidates' scores; started again, it goes on.
"""

import argparse
import ast
import json
import random
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longfit.bm25 import BM25Index, terms
from longfit.docqa import Document, ask_memory, compress
from longfit.docqa.citations import BM25_WEIGHT, candidates, ranked
from longfit.docqa.lexical import stands_in
from longfit.docqa.likelihood import lifts
from longfit.docqa.passages import Passage, passages
from longfit.eval.intervals import wilson

SEED = 42
SQUAD_ROUNDS, HOTPOT, LONGBENCH_EACH = (3, 4), 100, 34
LONGBENCH = ("hotpotqa", "2wikimqa", "multifieldqa_en")
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)


def squad(data: Path) -> Iterator[dict[str, Any]]:
    """Three questions of every article to the whole of it, and then four more of each."""
    pick, articles = random.Random(SEED), []
    for article in json.loads((data / "ruler" / "squad.json").read_text())["data"]:
        text, questions = "", []
        for paragraph in article["paragraphs"]:
            text += "\n\n" if text else ""
            for asked in paragraph["qas"]:
                if not asked["is_impossible"]:
                    given = asked["answers"][0]
                    start = len(text) + given["answer_start"]
                    questions.append((asked, given["text"], (start, start + len(given["text"]))))
            text += paragraph["context"]
        articles.append((article["title"], text, questions))
    for each in SQUAD_ROUNDS:
        for title, text, questions in articles:
            for chosen in pick.sample(questions, min(each, len(questions))):
                questions.remove(chosen)
                asked, answer, span = chosen
                yield _row("squad", asked["id"], title, text, asked["question"], answer, [span])


def hotpotqa(data: Path) -> Iterator[dict[str, Any]]:
    """Questions to all ten paragraphs of their context."""
    rows = json.loads((data / "ruler" / "hotpotqa.json").read_text())
    rows = [{**row, **{name: _parsed(row[name]) for name in ("context", "supporting_facts")}} for row in rows]
    rows = [row for row in rows if all(len(fact) == 2 for fact in row["supporting_facts"])]  # others lack the numbers
    for row in random.Random(SEED).sample(rows, HOTPOT):
        context = row["context"]
        supporting = {(title, number) for title, number in row["supporting_facts"]}
        text, spans = "", []
        for title, sentences in context:
            text += ("\n\n" if text else "") + f"{title}\n"
            for number, sentence in enumerate(sentences):
                if (title, number) in supporting:
                    spans.append((len(text), len(text) + len(sentence)))
                text += sentence
        yield _row("hotpotqa", row["_id"], "context", text.rstrip(), row["question"], row["answer"], spans)


def longbench(data: Path) -> Iterator[dict[str, Any]]:
    """Questions to the contexts of LongBench, where the answer stands in them word for word."""
    for task in LONGBENCH:
        lines = (data / "longbench" / f"{task}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        held = [row for row in rows if terms(row["answers"][0]) and _spans(row["context"], row["answers"][0])]
        for row in random.Random(SEED).sample(held, min(LONGBENCH_EACH, len(held))):
            spans = _spans(row["context"].strip(), row["answers"][0])
            yield _row("longbench", row["_id"], task, row["context"].strip(), row["input"], row["answers"][0], spans)


def _row(kind: str, key: str, name: str, text: str, question: str, answer: str, spans: list[Any]) -> dict[str, Any]:
    return {"set": kind, "id": key, "name": name, "text": text, "question": question, "gold": answer, "spans": spans}


def _spans(text: str, answer: str) -> list[tuple[int, int]]:
    return [found.span() for found in re.finditer(rf"\b{re.escape(answer)}\b", text, re.I)]


def _parsed(value: Any) -> Any:
    """A list, or the text of one as Python prints it."""
    return ast.literal_eval(value) if isinstance(value, str) else value


def measured(model: Any, tokenizer: Any, row: dict[str, Any], answer: str) -> dict[str, Any]:
    """The scores of one question's candidates, and the first passages of BM25."""
    document = Document(row["name"], row["text"])
    every = passages([document])
    index = BM25Index([passage.text for passage in every])
    queries = {"bm25_question": row["question"], "bm25_both": f"{row['question']} {answer}"}
    firsts = {name: _best(index.scores(query)) for name, query in queries.items()}
    found = candidates([document], row["question"], answer)
    raised = lifts(model, tokenizer, [c.passage.text for c in found], row["question"], answer)

    def gold(passage: Passage) -> bool:
        return any(passage.start < end and start < passage.end for start, end in row["spans"])

    return {
        "set": row["set"],
        "id": row["id"],
        "passages": len(every),
        "correct": stands_in(row["gold"], answer),
        "found": {name: gold(every[place]) for name, place in firsts.items()},
        "candidates": [
            [gold(c.passage), round(c.bm25, 4), round(lift, 4), stands_in(answer, c.passage.text, row["question"])]
            for c, lift in zip(found, raised, strict=True)
        ],
    }


def _best(scores: list[float]) -> int:
    return max(range(len(scores)), key=lambda place: (scores[place], -place))


def run(data: Path, output: Path, sets: list[str], answers: list[str]) -> None:
    """Do what is not done yet."""
    import longfit

    output.mkdir(parents=True, exist_ok=True)
    file = output / "rows.jsonl"
    done = {(r["answers"], r["set"], r["id"]) for r in _read(file)}
    model, tokenizer = longfit.load("smollm2-135m")
    model = longfit.wrap(model, "snapkv", budget="25%")
    for kind in answers:
        for name in sets:
            memory, of = None, ""
            for row in globals()[name](data):
                if (kind, row["set"], row["id"]) in done:
                    continue
                answer = row["gold"]
                if kind == "own":
                    if of != row["text"]:
                        memory, of = compress(model, tokenizer, Document(row["name"], row["text"])), row["text"]
                    assert memory is not None
                    answer = ask_memory(model, tokenizer, memory, row["question"], max_new_tokens=24).text
                made = {"answers": kind, **measured(model, tokenizer, row, answer)}
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(made) + "\n")


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def table(output: Path) -> str:
    """Markdown: how often each way of ranking has a gold passage first."""
    rows = _read(output / "rows.jsonl")
    names = ["BM25 of the question", "BM25 of question and answer"]
    names += [f"likelihood + {w:g} BM25" if w else "likelihood alone" for w in WEIGHTS] + ["as used"]
    lines = ["| answers | documents | n | passages | gold among candidates | " + " | ".join(names) + " |"]
    lines.append("|" + "---|" * (5 + len(names)))
    for kind, name in sorted({(row["answers"], row["set"]) for row in rows}):
        of = [row for row in rows if (row["answers"], row["set"]) == (kind, name)]
        hits = [[row["found"]["bm25_question"] for row in of], [row["found"]["bm25_both"] for row in of]]
        hits += [[_first(row, weight) for row in of] for weight in WEIGHTS] + [[_used(row) for row in of]]
        within = sum(any(c[0] for c in row["candidates"]) for row in of) / len(of)
        cells = [
            kind,
            name,
            str(len(of)),
            f"{statistics.median(row['passages'] for row in of):g}",
            f"{100 * within:.0f} %",
        ]
        lines.append("| " + " | ".join([*cells, *map(_share, hits)]) + " |")
    return "\n".join(lines)


def _first(row: dict[str, Any], weight: float) -> bool:
    given = row["candidates"]
    order = ranked([c[1] for c in given], [c[2] for c in given], weight)
    return bool(order) and bool(given[order[0][0]][0])


def _used(row: dict[str, Any]) -> bool:
    """As `cite` does it: where the answer stands in none of the candidates, the question alone decides."""
    verified = any(c[3] for c in row["candidates"])
    return _first(row, BM25_WEIGHT) if verified else bool(row["found"]["bm25_question"])


def _share(hits: list[bool]) -> str:
    low, high = wilson(sum(hits), len(hits))
    return f"{100 * sum(hits) / len(hits):.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sets", default="squad,hotpotqa,longbench")
    parser.add_argument("--answers", default="gold,own")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    given = parser.parse_args()
    if not given.table:
        if given.data is None:
            parser.error("--data FOLDER, the benchmark inputs")
        run(given.data, given.output, given.sets.split(","), given.answers.split(","))
    text = table(given.output)
    (given.output / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""Questions about paragraphs: SQuAD and HotpotQA, from the files that RULER's tasks use."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longfit.errors import DataError, InputError
from longfit.training.data.documents import Document, split_of, tokens_of
from longfit.training.data.episode import ANSWER, EVAL, TEXT, TRAIN, Builder, Episode

FILES = {"squad": "squad.json", "hotpotqa": "hotpotqa.json"}
TRIES = 200


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the paragraphs that hold it, by number."""

    text: str
    answer: str
    gold: tuple[int, ...]


class Questions:
    """A question after the paragraphs that answer it, among others, in a context of exact size.

    The unit of the split is the paragraph: a question is evaluated if all of its paragraphs are held out, trained on if
    none is, and left out in between. A paragraph that is too long is cut around the answer.

    Args:
        kind: "squad" or "hotpotqa".
        data: folder with ruler/squad.json or squad.json (SQuAD 2.0), ruler/hotpotqa.json or hotpotqa.json.

    Raises:
        DataError: the file is missing, broken, or has no question.
    """

    def __init__(self, kind: str, tokenizer: Any, data: str | Path | None) -> None:
        self.kind, self.tokenizer = kind, tokenizer
        self.paragraphs, questions = _read(kind, data)
        held = [split_of(paragraph) == EVAL for paragraph in self.paragraphs]
        self.questions = {
            EVAL: [q for q in questions if all(held[n] for n in q.gold)],
            TRAIN: [q for q in questions if not any(held[n] for n in q.gold)],
        }
        self.others = {split: [n for n, h in enumerate(held) if h == (split == EVAL)] for split in (TRAIN, EVAL)}
        for split, found in self.questions.items():
            if not found:
                raise DataError(f"{kind} has no question for {split}: {len(questions)} in all are too few")
        self._ids: dict[int, list[int]] = {}

    def episode(self, rng: random.Random, context_tokens: int, target_tokens: int, split: str, step: int) -> Episode:
        for _ in range(TRIES):
            question = rng.choice(self.questions[split])
            gold, end = self._gold(question, context_tokens), tokens_of(self.tokenizer, "\n")
            built = Builder().add(tokens_of(self.tokenizer, f"\nQuestion: {question.text}\nAnswer:"), 0.0)
            answer = tokens_of(self.tokenizer, f" {question.answer}")
            if gold is None or len(built.ids) + len(answer) + len(end) > target_tokens:
                continue
            context = self._among(rng, gold, context_tokens, split)
            built.add(answer, ANSWER, True).add(end, TEXT)
            return built.episode(context, self.kind, self.paragraphs[question.gold[0]].name)
        raise InputError(
            f"no {self.kind} question fits context_tokens={context_tokens} and target_tokens={target_tokens}; "
            "raise them"
        )

    def _gold(self, question: Question, room: int) -> list[list[int]] | None:
        """The paragraphs as tokens, or None where they do not fit."""
        found = [self._tokens(number) for number in question.gold]
        if sum(map(len, found)) <= room:
            return found
        if len(found) > 1:
            return None
        text = self.paragraphs[question.gold[0]].text
        before = len(tokens_of(self.tokenizer, text[: max(0, text.find(question.answer))]))
        if before + 16 > len(found[0]):
            return None
        start = max(0, min(before - room // 2, len(found[0]) - room))
        return [found[0][start : start + room]]

    def _among(self, rng: random.Random, gold: list[list[int]], room: int, split: str) -> list[int]:
        """`room` tokens: the paragraphs at random places among others, the last of which is cut."""
        chosen, left = list(gold), room - sum(map(len, gold))
        while left > 0:
            other = self._tokens(rng.choice(self.others[split]))[:left]
            chosen.insert(rng.randint(0, len(chosen)), other)
            left -= len(other)
        return [token for paragraph in chosen for token in paragraph]

    def _tokens(self, number: int) -> list[int]:
        if number not in self._ids:
            self._ids[number] = tokens_of(self.tokenizer, self.paragraphs[number].text + "\n")
        return self._ids[number]

    def hashes(self, split: str) -> set[str]:
        return {self.paragraphs[number].sha256 for number in self.others[split]}


def _read(kind: str, data: str | Path | None) -> tuple[list[Document], list[Question]]:
    file = _file(kind, data)
    numbers: dict[str, int] = {}

    def number(text: str) -> int:
        return numbers.setdefault(text, len(numbers))

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = list(_squad(content, number) if kind == "squad" else _hotpotqa(content, number))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{file} is broken ({type(error).__name__}: {error})") from error
    if not found:
        raise DataError(f"{file} is empty: it has no answerable question")
    return [Document(f"{file.name}#{n}", text) for text, n in numbers.items()], found


def _squad(content: Any, number: Any) -> Iterator[Question]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            own = number(paragraph["context"])
            for asked in paragraph["qas"]:
                if not asked["is_impossible"]:
                    yield Question(asked["question"], asked["answers"][0]["text"], (own,))


def _hotpotqa(content: Any, number: Any) -> Iterator[Question]:
    for row in content:
        own = {title: number(f"{title}\n{''.join(sentences)}") for title, sentences in row["context"]}
        gold = {own[fact[0]] for fact in row["supporting_facts"] if fact[0] in own}
        if gold:
            yield Question(row["question"], row["answer"], tuple(sorted(gold)))


def _file(kind: str, data: str | Path | None) -> Path:
    if kind not in FILES:
        raise InputError(f"there are no questions called {kind!r}; there are {', '.join(FILES)}")
    if data is not None:
        for place in (Path(data) / "ruler", Path(data)):
            if (place / FILES[kind]).is_file():
                return place / FILES[kind]
    raise DataError(f"{kind} needs a data folder with ruler/{FILES[kind]} or {FILES[kind]}; {str(data)!r} has neither")

"""Question answering: qa_1 on SQuAD and qa_2 on HotpotQA paragraphs (``scripts/data/synthetic/qa.py``)."""

import random
from dataclasses import dataclass
from typing import Any

from longfit.eval.ruler.draft import Draft, RandomMaker, Surroundings

_ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
HEAD = _ASK + "\n\nThe following are given documents.\n\n"
TAIL = _ASK + "\n\nQuestion: {query}"
ANSWER_PREFIX = " Answer:"


@dataclass(frozen=True)
class Question:
    """``gold`` and ``related`` are numbers of documents: the answer's, and others of the same article."""

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class Documents:
    """A data set's questions, in its order, and its sorted paragraphs."""

    questions: list[Question]
    texts: list[str]


def squad(data: dict[str, Any]) -> Documents:
    """The answerable questions of a SQuAD 2.0 file."""
    paragraphs = [[p["context"] for p in article["paragraphs"]] for article in data["data"]]
    texts, number = _numbered(text for article in paragraphs for text in article)
    questions = []
    for article in data["data"]:
        numbers = [number[p["context"]] for p in article["paragraphs"]]
        for paragraph, own in zip(article["paragraphs"], numbers, strict=True):
            related = tuple(other for other in numbers if other != own)
            for asked in paragraph["qas"]:
                if not asked["is_impossible"]:
                    answers = tuple(answer["text"] for answer in asked["answers"])
                    questions.append(Question(asked["question"], answers, (own,), related))
    return Documents(questions, texts)


def hotpotqa(data: list[dict[str, Any]]) -> Documents:
    """The questions of a HotpotQA distractor file."""
    contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]] for row in data]
    texts, number = _numbered(text for context in contexts for text in context)
    questions = [
        Question(row["question"], (row["answer"],), tuple(number[text] for text in context))
        for row, context in zip(data, contexts, strict=True)
    ]
    return Documents(questions, texts)


def _numbered(texts: Any) -> tuple[list[str], dict[str, int]]:
    ordered = sorted(set(texts))
    return ordered, {text: i for i, text in enumerate(ordered)}


class QaMaker(RandomMaker):
    """Makes one qa task's samples; a haystack's unit is a document."""

    step = 10

    def __init__(self, around: Surroundings, seed: int, documents: Documents) -> None:
        super().__init__(around, seed)
        self.documents = documents

    def draft(self, index: int, units: int) -> Draft:
        question, texts = self.documents.questions[index], self.documents.texts
        if units < len(texts):
            chosen = [texts[i] for i in self._chosen(question, units)]
        else:
            chosen = (texts * -(-units // len(texts)))[:units]
        random.Random(self.seed).shuffle(chosen)
        context = "\n\n".join(f"Document {i + 1}:\n{text}" for i, text in enumerate(chosen))
        return Draft(HEAD, context + "\n\n", TAIL.format(query=question.query), ANSWER_PREFIX, question.answers)

    def _chosen(self, question: Question, units: int) -> list[int]:
        gold, related = list(question.gold), list(question.related)
        missing = units - len(gold)
        if missing <= len(related):
            return gold + self.random.sample(related, missing)
        taken = {*gold, *related}
        others = [i for i in range(len(self.documents.texts)) if i not in taken]
        return gold + related + self.random.sample(others, max(0, missing - len(related)))

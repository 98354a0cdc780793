"""Needles in a haystack: the eight niah tasks (``scripts/data/synthetic/niah.py``)."""

import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from longfit.eval.ruler.draft import Draft, RandomMaker, Surroundings

HEAD = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
TAIL = "What are all the special magic {kind} for {query} mentioned in the provided text?"
ANSWER_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# numpy's round(linspace(0, 100, 40)), without numpy.
DEPTHS = [round(step * 100 / 39) for step in range(40)]


@dataclass(frozen=True)
class NiahArguments:
    """What ``synthetic.yaml`` says of one niah task: kinds, and numbers of keys, values a key, and asked keys."""

    haystack: Literal["noise", "essay", "needle"]
    key_kind: Literal["words", "uuids"] = "words"
    value_kind: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1


class NiahMaker(RandomMaker):
    """Makes one niah task's samples; a haystack's unit is a word (essay) or a sentence.

    Args:
        pairs: the adjective-noun pairs that keys are drawn from.
        essay: the words of the essays; empty for other haystacks.
        sentences: splits text into sentences.
    """

    def __init__(
        self,
        arguments: NiahArguments,
        around: Surroundings,
        length: int,
        seed: int,
        pairs: Sequence[str],
        essay: Sequence[str],
        sentences: Callable[[str], list[str]],
    ) -> None:
        super().__init__(around, seed)
        self.arguments, self.pairs, self.essay, self.sentences = arguments, pairs, list(essay), sentences
        self.step = 500 if arguments.haystack == "essay" else 25 if length >= 4096 else 5

    def draft(self, index: int, units: int) -> Draft:
        arguments = self.arguments
        keys, values, needles = [], [], []
        for _ in range(max(arguments.keys, arguments.asked)):
            keys.append(self._drawn(arguments.key_kind))
            values.append([self._drawn(arguments.value_kind) for _ in range(arguments.values)])
            needles += [self._needle(keys[-1], value) for value in values[-1]]
        shuffled = list(needles)
        random.Random(self.seed).shuffle(shuffled)
        hidden = self._essay(units, shuffled) if arguments.haystack == "essay" else self._lines(units, shuffled)
        asked = self.random.sample(range(len(keys)), arguments.asked)
        queries = [keys[i] for i in asked]
        query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
        one = arguments.asked * arguments.values == 1
        head, tail, prefix = (self._worded(text, query, one) for text in (HEAD, TAIL, ANSWER_PREFIX))
        answers = [(value, self._needle(keys[i], value)) for i in asked for value in values[i]]
        found = tuple(needle for _, needle in answers)
        return Draft(head, hidden + "\n", tail, prefix, tuple(value for value, _ in answers), found)

    def _worded(self, template: str, query: str, one: bool) -> str:
        kind = self.arguments.value_kind
        if one:
            kind = kind[:-1]  # type: ignore[assignment]
            template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
        return template.format(kind=kind, query=query)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.arguments.value_kind, key=key, value=value)

    def _drawn(self, kind: str) -> str:
        if kind == "numbers":
            return str(self.random.randint(10**6, 10**7 - 1))
        if kind == "words":
            return self.random.choice(self.pairs)
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def _essay(self, words: int, needles: list[str]) -> str:
        repeats = max(1, -(-words // len(self.essay)))
        sentences = self.sentences(" ".join((self.essay * repeats)[:words]).strip())
        depths = self.random.sample(DEPTHS, len(needles))
        places = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
        pieces = []
        for i in range(1, len(places)):
            pieces.append(" ".join(sentences[places[i - 1] : places[i]]))
            pieces += needles[i - 1 : i]
        return " ".join(pieces)

    def _lines(self, count: int, needles: list[str]) -> str:
        if self.arguments.haystack == "noise":
            lines = [NOISE] * count
        else:
            kinds = (self.arguments.key_kind, self.arguments.value_kind)
            lines = [self._needle(self._drawn(kinds[0]), self._drawn(kinds[1])) for _ in range(count)]
        places = sorted(self.random.sample(range(count), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)


def essay_words(text: str) -> list[str]:
    """The words of the essays as the original splits them."""
    return re.sub(r"\s+", " ", text).split(" ")

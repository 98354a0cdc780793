"""Three failure probes of compressed contexts, for every kind of compressor.

Deng et al. 2024, "A Silver Bullet or a Compromise for Full Attention?" (arXiv:2412.17483) finds three ways in which
gist tokens lose information. They measure the first by perplexity and by where generation starts; here all three are
the recall of a planted fact, so that they mean the same for key/value methods and for learned ones:

- ``boundary`` (lost by the boundary): a fact right after a segment's boundary, in the middle, at the end, or across.
- ``surprise`` (lost if surprise): the same text asked for a fact on its topic or off it, in pairs.
- ``along_the_way`` (lost along the way): 32 hexadecimal digits to be copied; how many are right before a mistake.

A context is put together from tokens, not from text: each part is tokenised by itself, so that sizes and places are
exact to the token and the filler may be cut inside a word.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longfit.errors import InputError
from longfit.eval.needle import load_haystack
from longfit.eval.sample import Prompt, Sample, frame, in_template, tokens_of
from longfit.eval.task import Task

SEGMENT_TOKENS = 512
PLACES = ("after", "middle", "end", "across")
PREFIX_DIGITS = (4, 8, 16, 32)
CODE_TOKENS, KEY_TOKENS = 16, 48
INTRO = "Read the following text. I will ask you about it afterwards.\n"
NAMES = ["Amara", "Boris", "Celia", "Dmitri", "Elif", "Farid", "Greta", "Hiro", "Ingrid", "Jonas", "Keiko", "Lorenzo"]
# Of each topic: what the facts are about, and what the text around them is made of.
TOPICS = {
    "sailing": (
        ["anchor", "compass", "rudder", "mainsail", "lifeboat", "capstan"],
        ["The crew {did} the ropes before the {time} tide.", "A {adjective} wind filled the harbour by {time}."],
    ),
    "cooking": (
        ["skillet", "cleaver", "whisk", "casserole", "ladle", "rolling pin"],
        ["The cook {did} the vegetables for the {time} meal.", "A {adjective} broth simmered on the stove by {time}."],
    ),
    "astronomy": (
        ["telescope", "spectrograph", "sextant", "photometer", "dome motor", "star chart"],
        ["The observers {did} the plates of the {time} sky.", "A {adjective} comet stood over the ridge by {time}."],
    ),
    "gardening": (
        ["wheelbarrow", "greenhouse", "trowel", "sprinkler", "compost bin", "hedge trimmer"],
        ["The gardeners {did} the roses in the {time} shade.", "A {adjective} hedge had closed the path by {time}."],
    ),
}
DID = ["sorted", "checked", "counted", "cleaned", "moved", "covered", "praised", "mixed up"]
TIMES = ["morning", "noon", "evening", "midnight", "early", "late"]
ADJECTIVES = ["strong", "thin", "pale", "heavy", "quiet", "strange", "bright", "cold"]
_CODE = re.compile(r"\d{5}")


@dataclass(frozen=True)
class Fact:
    """What is planted, asked, and answered."""

    text: str
    question: str
    answer_prefix: str
    answer: str


class _Room:
    """One sample's frame, and the tokens that its context may have."""

    def __init__(self, tokenizer: Any, fact: Fact, length: int, new_tokens: int, chat: bool) -> None:
        self.tokenizer = tokenizer
        before, self.after = frame(tokenizer, INTRO, f"\n{fact.question}", answer_prefix=fact.answer_prefix, chat=chat)
        self.before_ids = tokens_of(tokenizer, before, not in_template(tokenizer, chat))
        self.after_ids = tokens_of(tokenizer, self.after, False)
        self.fact_ids = tokens_of(tokenizer, f"\n{fact.text}\n", False)
        self.tokens = length - new_tokens - len(self.after_ids)

    def start_at(self, depth: float) -> int:
        """The fact's first token at a depth of the filler, 0 the beginning and 1 the end.

        Raises:
            InputError: the fact and the frame do not leave a filler.
        """
        free = self.tokens - len(self.before_ids) - len(self.fact_ids)
        if free < 1:
            raise InputError(f"the length leaves {free} tokens for the text around the fact; raise it")
        return len(self.before_ids) + int(free * depth)

    def prompt(self, filler: tuple[int, ...], start: int) -> Prompt:
        """The filler around the fact, whose first token is number ``start`` of the context."""
        first = start - len(self.before_ids)
        rest = self.tokens - start - len(self.fact_ids)
        ids = self.before_ids + filler[:first] + self.fact_ids + filler[first : first + rest]
        return Prompt(self.tokenizer.decode(ids), self.after, ids, self.after_ids, self.before_ids)


class ProbeTask(Task):
    """What the probes share: samples by index, each of its own random numbers, the first ones the same for every n."""

    suite = "probes"
    metric = "recall"
    new_tokens = CODE_TOKENS
    name: str

    def samples(
        self,
        tokenizer: Any,
        *,
        length: int,
        n: int,
        seed: int = 42,
        data: str | Path | None = None,
        chat: bool = True,
    ) -> list[Sample]:
        text = load_haystack(data)
        sentences = text.sentences(0, len(text.words)) if text.source != "noise" else []
        filler = Filler(tokenizer, sentences, text.joiner, list(text.words))
        return [self._sample(filler, index, seed, length, chat) for index in range(n)]

    def _sample(self, filler: "Filler", index: int, seed: int, length: int, chat: bool) -> Sample:
        raise NotImplementedError

    def _made(self, index: int, room: _Room, ids: tuple[int, ...], start: int, fact: Fact, **details: Any) -> Sample:
        span = [start, start + len(room.fact_ids)]
        return Sample(
            suite=self.suite,
            task=self.name,
            index=index,
            prompt=room.prompt(ids, start),
            answers=(fact.answer,),
            max_new_tokens=self.new_tokens,
            details={"fact_tokens": span, "depth": round(start / room.tokens, 4)} | details,
        )

    def score(self, prediction: str, sample: Sample) -> float:
        """1 where the first five digits in a row are the code."""
        found = _CODE.search(prediction)
        return float(found is not None and found.group() == sample.answers[0])

    def settled(self, prediction: str, sample: Sample) -> bool:
        return _CODE.search(prediction) is not None


@dataclass(frozen=True)
class Filler:
    """The text around a fact. ``sentences`` are the data folder's, empty where there is none."""

    tokenizer: Any
    sentences: list[str]
    joiner: str
    words: list[str]

    def running(self, rng: random.Random, tokens: int) -> tuple[int, ...]:
        """``tokens`` tokens of the data folder's text, or of the noise sentences, from a random word on."""
        start = rng.randrange(len(self.words))
        return self._cut(lambda size: " ".join(self.words[(start + i) % len(self.words)] for i in range(size)), tokens)

    def about(self, topic: str, rng: random.Random, tokens: int) -> tuple[int, ...]:
        """``tokens`` tokens about a topic, every third sentence from the data folder where there is one."""
        made: list[str] = []

        def text(size: int) -> str:
            while len(made) < size:
                if self.sentences and len(made) % 3 == 2:
                    made.append(rng.choice(self.sentences))
                    continue
                template = rng.choice(TOPICS[topic][1])
                words = {"did": rng.choice(DID), "time": rng.choice(TIMES), "adjective": rng.choice(ADJECTIVES)}
                made.append(template.format(**words))
            return " ".join(made[:size])

        return self._cut(text, tokens)

    def _cut(self, text: Any, tokens: int) -> tuple[int, ...]:
        size = max(16, tokens // 4)
        while len(ids := tokens_of(self.tokenizer, text(size), False)) < tokens:
            size *= 2
        return ids[:tokens]


class BoundaryTask(ProbeTask):
    """A fact whose place relative to the segments' boundaries is set; segments are counted from the context's first
    token. `details`: `place`, one of `PLACES`, in turn; `offset`, the fact's first token counted from the last
    boundary; `segment`, the one it begins in; `segment_tokens`."""

    def __init__(self, name: str = "boundary", segment_tokens: int = SEGMENT_TOKENS) -> None:
        self.name, self.segment_tokens = name, segment_tokens
        self.minimum_length = 3 * segment_tokens

    def _sample(self, filler: Filler, index: int, seed: int, length: int, chat: bool) -> Sample:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        fact = code_fact(rng, rng.choice(NAMES), "access code")
        room = _Room(filler.tokenizer, fact, length, self.new_tokens, chat)
        size, fact_tokens, place = self.segment_tokens, len(room.fact_ids), PLACES[index % len(PLACES)]
        segments = room.tokens // size
        if segments < 2 or fact_tokens > size or len(room.before_ids) > size - fact_tokens:
            raise InputError(
                f"length={length} of {self.name} holds {segments} segments of {size} tokens beside the question, and a "
                f"fact takes {fact_tokens}; at least 2 segments that each hold the template or a fact are needed"
            )
        # The segments in turn for each place; the first one holds the template.
        boundary = size * (1 + (index // len(PLACES)) % (segments - 1))
        start = (
            boundary
            + {
                "after": 0,
                "middle": (size - fact_tokens) // 2,
                "end": size - fact_tokens,
                "across": -(fact_tokens // 2),
            }[place]
        )
        details = {"place": place, "offset": start % size, "segment": start // size, "segment_tokens": size}
        return self._made(index, room, filler.running(rng, room.tokens), start, fact, **details)


class SurpriseTask(ProbeTask):
    """Pairs of samples with the same text and code, one asked about a thing of the text's topic and one of another.
    `details`: `topic`, "on" or "off"; `domain`, the text's topic; `pair`."""

    name = "surprise"

    def _sample(self, filler: Filler, index: int, seed: int, length: int, chat: bool) -> Sample:
        pair, off = divmod(index, 2)
        rng = random.Random(f"{self.name}/{seed}/{pair}")
        domain, other = rng.sample(list(TOPICS), 2)
        things = rng.choice(TOPICS[domain][0]), rng.choice(TOPICS[other][0])
        fact = code_fact(rng, f"the {things[off]}", "registry number")
        room = _Room(filler.tokenizer, fact, length, self.new_tokens, chat)
        start = room.start_at(spread(pair))
        details = {"topic": ("on", "off")[off], "domain": domain, "pair": pair}
        return self._made(index, room, filler.about(domain, rng, room.tokens), start, fact, **details)


class AlongTheWayTask(ProbeTask):
    """A key of 32 hexadecimal digits to be copied; the score is the share of them that are right before the first
    mistake. `prefix_right` breaks an answer down."""

    name = "along_the_way"
    metric = "prefix"
    new_tokens = KEY_TOKENS

    def _sample(self, filler: Filler, index: int, seed: int, length: int, chat: bool) -> Sample:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        name, key = rng.choice(NAMES), f"{rng.getrandbits(128):032x}"
        fact = Fact(
            f"The serial key of {name} is {key}.",
            f"What is the serial key of {name}?",
            f" The serial key of {name} is",
            key,
        )
        room = _Room(filler.tokenizer, fact, length, self.new_tokens, chat)
        start = room.start_at(spread(index))
        return self._made(index, room, filler.running(rng, room.tokens), start, fact)

    def score(self, prediction: str, sample: Sample) -> float:
        return leading_right(prediction, sample.answers[0]) / len(sample.answers[0])

    def settled(self, prediction: str, sample: Sample) -> bool:
        right = leading_right(prediction, sample.answers[0])
        return right == len(sample.answers[0]) or right < len(_digits(prediction))


def code_fact(rng: random.Random, owner: str, kind: str) -> Fact:
    """A 5-digit code of somebody or something."""
    code = str(rng.randrange(10_000, 100_000))
    return Fact(
        f"The {kind} of {owner} is {code}.", f"What is the {kind} of {owner}?", f" The {kind} of {owner} is", code
    )


def spread(index: int) -> float:
    """Depths in 0..1 that cover it evenly at every number of samples (additive recurrence of the golden ratio)."""
    return (0.5 + index * 0.6180339887498949) % 1


def leading_right(prediction: str, key: str) -> int:
    """Digits of ``key`` that the answer has right before its first mistake; leading blanks and quotes do not count."""
    answer = _digits(prediction)
    for place, wanted in enumerate(key):
        if answer[place : place + 1] != wanted:
            return place
    return len(key)


def prefix_right(prediction: str, key: str) -> dict[int, bool]:
    """Whether the first 4, 8, 16 and 32 digits are all right."""
    right = leading_right(prediction, key)
    return {digits: right >= digits for digits in PREFIX_DIGITS}


def _digits(prediction: str) -> str:
    return prediction.lstrip(" \t\r\n:*\"'`").lower()


TASKS: dict[str, Task] = {task.name: task for task in (BoundaryTask(), SurpriseTask(), AlongTheWayTask())}

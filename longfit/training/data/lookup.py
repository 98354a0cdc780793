"""Synthetic lookup: facts hidden in filler text, then recalled in another order."""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longfit.errors import InputError
from longfit.training.checks import mapping, number, whole
from longfit.training.data.documents import Pool, hashes_of, tokens_of
from longfit.training.data.episode import ANSWER, EVAL, TEXT, Builder, Episode

NOUNS = """
lamp door chair table window bridge wagon barrel ladder bottle basket blanket button candle carpet ceiling clock
curtain drawer engine fence flag garden gate glove hammer helmet jacket kettle mirror needle oven paddle pencil
piano pillow pocket ribbon rope saddle scarf shelf shovel sofa spoon statue stove suitcase tent ticket tower
tractor trumpet tunnel umbrella vase violin wallet wheel whistle
""".split()  # noqa: SIM905
WORDS = """
red blue green yellow black white brown pink purple grey orange golden silver old new cold warm broken empty
full heavy light wet dry clean dirty small large round square soft hard cheap rare open closed hidden lost safe
loud
""".split()  # noqa: SIM905
NAMES = """
Anna Boris Carla David Elena Frank Grace Henry Irene James Karen Louis Maria Nora Oscar Paula Robert Sarah
Thomas Victor
""".split()  # noqa: SIM905
SENTENCES = {
    "word": ("The {noun} is", "{value}", "."),
    "name": ("The {noun} belongs to", "{value}", "."),
    "number": ("The {noun} has the number", "{value}", "."),
    "code": ("The code of the {noun} is", "{value}", "."),
    "pin": ("The pin of the {noun} is", "{value}", "."),
}
# On the topic of the facts, and free of what is asked.
ABOUT = (
    "Somebody had moved the {noun} before noon.",
    "Nobody could remember who had left the {noun} there.",
    "They talked about the {noun} for a while.",
    "The {noun} stood near the {other} all day.",
    "Every visitor asked about the {noun} and the {other}.",
)
HELD_OUT = 5


@dataclass(frozen=True)
class Fact:
    """A thing and what is said of it, as tokens of a sentence: before the value, the value, after it."""

    before: list[int]
    value: list[int]
    after: list[int]

    @property
    def ids(self) -> list[int]:
        return [*self.before, *self.value, *self.after]


class Lookup:
    """Facts such as "The lamp is red." in filler text; the target is some of them in random order.

    Pairs of thing and value are split by hash: those that are evaluated are never trained on. Filler is text of the
    pools (off the facts' topic), or sentences about the same things (on it).

    Args:
        pools: filler documents by split; None for sentences about the things only.
        kinds: chance of each kind of fact: "word", "name", "number" (3 digits), "code" (as K27M), "pin" (5 digits).
        facts: in a context, as far as they fill three quarters of it at most.
        asked: of them in the target, as far as `target_tokens` holds them.
        on_topic: share of the contexts whose filler is about the things.
    """

    kind = "lookup"

    def __init__(
        self,
        pools: dict[str, Pool] | None,
        tokenizer: Any,
        kinds: Mapping[str, float] | None = None,
        facts: int = 8,
        asked: int = 6,
        on_topic: float = 0.25,
    ) -> None:
        self.pools, self.tokenizer = pools, tokenizer
        self.kinds = mapping(number(least=0))(kinds or {"word": 1.0}, "lookup.kinds")
        if unknown := sorted(set(self.kinds) - set(SENTENCES)):
            raise InputError(f"lookup has no facts of kind {', '.join(unknown)}; there are {', '.join(SENTENCES)}")
        if not sum(self.kinds.values()):
            raise InputError(f"lookup.kinds={kinds!r}: none of them has a chance; give one a number above 0")
        asked, facts = whole(1)(asked, "lookup.asked"), whole(1)(facts, "lookup.facts")
        if not asked <= facts <= len(NOUNS):
            raise InputError(f"lookup asks {asked} of {facts} facts; give 1 <= asked <= facts <= {len(NOUNS)}")
        on_topic = number(least=0, most=1)(on_topic, "lookup.on_topic")
        self.facts, self.asked, self.on_topic = facts, asked, on_topic if pools else 1.0

    def episode(self, rng: random.Random, context_tokens: int, target_tokens: int, split: str, step: int) -> Episode:
        nouns = rng.sample(NOUNS, self.facts)
        facts: list[Fact] = []
        for noun in nouns:
            fact = self._fact(rng, noun, split)
            if facts and sum(len(f.ids) for f in [*facts, fact]) > context_tokens * 3 // 4:
                break
            facts.append(fact)
        filler, name = self._filler(rng, nouns, context_tokens - sum(len(fact.ids) for fact in facts), split)
        context = self._hidden(rng, facts, filler)
        if len(context) != context_tokens:
            raise InputError(f"context_tokens={context_tokens} is too small for one fact of {len(facts[0].ids)} tokens")
        built = Builder().add(tokens_of(self.tokenizer, "\n"), 0.0)
        for fact in rng.sample(facts, min(self.asked, len(facts))):
            if len(built.ids) > 1 and len(built.ids) + len(fact.ids) > target_tokens:
                break
            built.add(fact.before, TEXT).add(fact.value, ANSWER, True).add(fact.after, TEXT)
        return built.episode(context, self.kind, name)

    def _fact(self, rng: random.Random, noun: str, split: str) -> Fact:
        kind = rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        while True:
            value = _value(rng, kind)
            if (held_out(noun, value)) == (split == EVAL):
                break
        before, middle, after = SENTENCES[kind]
        texts = (f" {before.format(noun=noun)}", f" {middle.format(value=value)}", after)
        return Fact(*(tokens_of(self.tokenizer, text) for text in texts))

    def _filler(self, rng: random.Random, nouns: list[str], tokens: int, split: str) -> tuple[list[int], str]:
        if tokens < 1:
            return [], "no filler"
        if self.pools and rng.random() >= self.on_topic:
            ids, document = self.pools[split].window(rng, tokens)
            return ids, document.name
        ids = []
        while len(ids) < tokens:
            noun, other = rng.sample(nouns, 2)
            ids += tokens_of(self.tokenizer, " " + rng.choice(ABOUT).format(noun=noun, other=other))
        return ids[:tokens], "sentences about the things"

    def _hidden(self, rng: random.Random, facts: list[Fact], filler: list[int]) -> list[int]:
        """The facts in the filler, at ends of sentences where there are enough of them."""
        ends = [place + 1 for place, token in enumerate(filler) if token in self._stops]
        room = ends if len(ends) >= len(facts) else range(len(filler) + 1)
        places = sorted(rng.sample(room, len(facts)) if len(room) >= len(facts) else rng.choices(room, k=len(facts)))
        context, start = [], 0
        for fact, place in zip(facts, places, strict=True):
            context += filler[start:place] + fact.ids
            start = place
        return context + filler[start:]

    @property
    def _stops(self) -> set[int]:
        if not hasattr(self, "_stop_ids"):
            self._stop_ids = {tokens_of(self.tokenizer, text)[-1] for text in ("a.", "a .", "a!", "a?", "a\n")}
        return self._stop_ids

    def hashes(self, split: str) -> set[str]:
        return hashes_of(self.pools[split].documents) if self.pools else set()


def held_out(noun: str, value: str) -> bool:
    """Whether a pair is one of the fifth that is only evaluated."""
    return hashlib.sha256(f"{noun}/{value}".encode()).digest()[0] % HELD_OUT == 0


def _value(rng: random.Random, kind: str) -> str:
    if kind == "word":
        return rng.choice(WORDS)
    if kind == "name":
        return rng.choice(NAMES)
    if kind == "number":
        return str(rng.randrange(100, 1000))
    if kind == "pin":
        return str(rng.randrange(10_000, 100_000))
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    return f"{rng.choice(letters)}{rng.randrange(10, 100)}{rng.choice(letters)}"

"""A sample in the making, and the search for the largest haystack that fits (the generators' common loop)."""

import random
from dataclasses import dataclass
from typing import Any, Protocol

from longfit.errors import InputError
from longfit.eval.sample import Prompt, frame, in_template, make_prompt, tokens_of

# The original tries the smallest haystack again and again, for ever; other random draws may make it fit.
TRIES_AT_THE_SMALLEST = 20


@dataclass(frozen=True)
class Draft:
    """The parts of one sample's text, inside the chat template, and the references.

    Attributes:
        needles: the texts of the asked needles, each once in ``content``; empty where the task has none.
    """

    head: str
    content: str
    tail: str
    answer_prefix: str
    answers: tuple[str, ...]
    needles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Surroundings:
    """A tokenizer with its chat template: measures a draft as the original does, and cuts it into a prompt.

    ``before`` and ``after`` are the chat template's text round the user's turn; both empty without one.
    """

    tokenizer: Any
    chat: bool
    before: str
    after: str

    @classmethod
    def of(cls, tokenizer: Any, chat: bool) -> "Surroundings":
        return cls(tokenizer, chat, *frame(tokenizer, "", "", chat=in_template(tokenizer, chat)))

    def text(self, draft: Draft) -> str:
        return self.before + draft.head + draft.content + draft.tail + self.after + draft.answer_prefix

    def tokens(self, draft: Draft) -> int:
        """Tokens of the whole text at once, without the tokenizer's own opening and closing ones."""
        return self.count(self.text(draft))

    def count(self, text: str) -> int:
        return len(tokens_of(self.tokenizer, text, False))

    def prompt(self, draft: Draft) -> Prompt:
        parts = (draft.head, draft.content, draft.tail)
        return make_prompt(self.tokenizer, *parts, answer_prefix=draft.answer_prefix, chat=self.chat)


class Maker(Protocol):
    """One task's generator: owns its random state and draws from it in the original's order.

    Attributes:
        step: the smallest haystack, and what a sample that came out too long is shortened by.
    """

    step: int

    def upper_bound(self, length: int) -> int:
        """The largest haystack worth trying for ``length`` tokens of prompt and answer."""
        ...

    def tried(self, units: int) -> int:
        """Tokens of the prompt of a fresh draft with a haystack of ``units``."""
        ...

    def draft(self, index: int, units: int) -> Draft:
        """Sample ``index`` with a haystack of ``units``.

        Raises:
            ValueError, IndexError: the draws do not make a sample, as in the original.
        """
        ...

    def state(self) -> Any:
        """All random state, for ``restore``."""
        ...

    def restore(self, state: Any) -> None: ...


class RandomMaker:
    """What makers share that draw from one ``random`` and need no more of a draft than its number and size."""

    step: int

    def __init__(self, around: Surroundings, seed: int) -> None:
        self.around, self.seed, self.random = around, seed, random.Random(seed)

    def state(self) -> Any:
        return self.random.getstate()

    def restore(self, state: Any) -> None:
        self.random.setstate(state)

    def upper_bound(self, length: int) -> int:
        return per_unit_bound(self.tried(self.step), self.step, length)

    def tried(self, units: int) -> int:
        return self.around.tokens(self.draft(0, units))

    def draft(self, index: int, units: int) -> Draft:
        raise NotImplementedError


def largest(maker: Maker, length: int, answer_tokens: int) -> int:
    """The haystack that the binary search of the original settles on; ``maker.step`` where nothing fits."""
    low, best = maker.step, maker.step
    high = max(maker.upper_bound(length), 2 * maker.step)
    while low <= high:
        middle = (low + high) // 2
        if maker.tried(middle) + answer_tokens <= length:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best


def drafts(maker: Maker, around: Surroundings, task: str, n: int, length: int, answer_tokens: int) -> list[Draft]:
    """``n`` drafts of at most ``length`` tokens with the answer, jointly tokenised and as `Prompt` cuts them.

    Raises:
        InputError: the smallest haystack does not fit; the message has a length that would do.
    """
    room = length - answer_tokens
    units = largest(maker, length, answer_tokens)
    return [_draft(maker, around, task, index, units, room, answer_tokens) for index in range(n)]


def _draft(
    maker: Maker, around: Surroundings, task: str, index: int, units: int, room: int, answer_tokens: int
) -> Draft:
    tries, shortest = 0, 0
    while tries < TRIES_AT_THE_SMALLEST:
        before = maker.state()
        try:
            draft = maker.draft(index, units)
            tokens = around.tokens(draft)
        except (ValueError, IndexError):
            tokens = 0
        if 0 < tokens <= room:
            return _cut(maker, around, draft, before, index, units, room)
        shortest = min(shortest, tokens) if shortest and tokens else tokens or shortest
        tries += units <= maker.step
        units = units - maker.step if units > maker.step else units
    wanted = max(shortest, room + 1) + answer_tokens
    raise InputError(
        f"{task} does not fit into {room + answer_tokens} tokens: sample {index} with its smallest haystack needs "
        f"about {wanted}; raise the length"
    )


def _cut(maker: Maker, around: Surroundings, draft: Draft, before: Any, index: int, units: int, room: int) -> Draft:
    """``draft``, or the next smaller that still fits when its parts are tokenised apart.

    The random state afterwards is as if ``draft`` had been taken, so that later samples are the original's.
    """
    after = maker.state()
    while len((prompt := around.prompt(draft)).context_ids) + len(prompt.question_ids) > room and units > 1:
        units -= 1
        maker.restore(before)
        draft = maker.draft(index, units)
    maker.restore(after)
    return draft


def per_unit_bound(tokens: int, units: int, length: int) -> int:
    """The original's upper bound: three times what ``tokens`` for ``units`` lets expect, in its order of rounding."""
    return int((length / (tokens / units)) * 3)

"""The contract of prompt compressors, and their registry.

A prompt compressor leaves out tokens of a text, whole words at a time; what stays is an ordinary, shorter prompt. A
method is one class in one file that says which tokens stay (`choose`). Decoding, the prompt's frame, budgets, batches,
memories and saving are done elsewhere, once, for all.
"""

import copy
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch

from longfit.bm25 import spaceless
from longfit.compressors.prompt.lm import LanguageModel, scorer_of, tokenizer_of
from longfit.compressors.prompt.passage import Passage, question_of
from longfit.compressors.prompt.units import fixed
from longfit.errors import BudgetError, InputError, UnsupportedFeatureError
from longfit.registry import register
from longfit.units import share_of

_REGISTRY: dict[str, type["PromptCompressor"]] = {}


class Kept(NamedTuple):
    """What stays of a prompt: token ids, and for each the place in the prompt of what it is or stands for."""

    ids: list[int]
    places: list[int]


@dataclass(frozen=True)
class CompressedText:
    """What stays of a text.

    Attributes:
        text: the kept stretches; a space stands between two words that were apart.
        spans: the stretches of characters of the source that were kept, ascending.
        kept_tokens: of `text`, by the target's tokenizer.
        tokens_in: of the source.
    """

    text: str
    spans: list[tuple[int, int]]
    kept_tokens: int
    tokens_in: int


class Question(NamedTuple):
    """What is asked: the token ids behind the context, and the question in them as text."""

    ids: list[int]
    text: str


@dataclass
class PromptCompressor:
    """Base of every method that shortens a prompt before the model reads it.

    Declarations (class attributes):
        name, source, summary: as for every compressor.
        scores: what is scored, in words.
        deviations: where this differs from the paper, in words.
        query_aware: chooses with the question, and refuses to choose without one.
        reads: a language model reads the text to score it.
        held_tokens: tokens whose keys and values it holds meanwhile.
        default_ratio: the fraction kept where neither a budget nor the options say it.

    Attributes (options):
        keep_ratio: fraction of the prompt's tokens to keep, where no budget says it: alone without a budget
            (`default_ratio` if left out), or before another compressor, whose budget it otherwise does not go below.
        kept_tokens: tokens to keep instead.
        window_tokens: last tokens of a prompt that stay where nobody said which tokens are the question.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    scores: ClassVar[str] = ""
    deviations: ClassVar[str] = ""
    query_aware: ClassVar[bool] = False
    reads: ClassVar[bool] = False
    held_tokens: ClassVar[int] = 0
    default_ratio: ClassVar[float] = 0.5

    keep_ratio: float | None = None
    kept_tokens: int | None = None
    window_tokens: int = 32

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register("compressor", _REGISTRY, cls)

    def __post_init__(self) -> None:
        if self.keep_ratio is not None and self.kept_tokens is not None:
            raise InputError(f"{self.name}: give keep_ratio or kept_tokens, not both")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise InputError(f"{self.name}: keep_ratio has to be above 0 and at most 1, got {self.keep_ratio}")
        for option, least in (("kept_tokens", 1), ("window_tokens", 0)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise InputError(f"{self.name}: {option} has to be at least {least}, got {value}")

    # -- what a method writes -------------------------------------------------------------------------------------

    def choose(self, passage: Passage, free: list[bool], question: Question | None, room: int) -> list[int]:
        """Ascending places of the free tokens to keep, at most `room` and as near to it as whole words allow.

        Args:
            passage: the prompt without what is asked, its frame included.
            free: which tokens are not the prompt's frame, more than `room` of them.
            question: never None for methods that are `query_aware`.
        """
        raise NotImplementedError

    def make(self, passage: Passage, free: list[bool], question: Question | None, room: int) -> Kept:
        """What stays of the free tokens. Methods that write text of their own put it here."""
        places = self.choose(passage, free, question, room)
        return Kept([passage.ids[place] for place in places], places)

    # -- what all of them have ------------------------------------------------------------------------------------

    def bind(self, model: Any = None, tokenizer: Any = None) -> "PromptCompressor":
        """Take the model that will read the prompt, and its tokenizer (found beside the model where it is left out).

        Raises:
            InputError: no tokenizer is found, or a model is needed and there is none.
        """
        self.tokenizer = tokenizer_of(model, tokenizer, self.name)
        self.lm: LanguageModel | None = None
        if self.reads:
            self.lm = scorer_of(getattr(self, "scorer", None), model, self.tokenizer, self.name)
        return self

    def release(self) -> None:
        """Forget the model."""
        self.lm = None

    def copy(self) -> "PromptCompressor":
        """The same options, bound to nothing."""
        return copy.copy(self)

    def reader(self) -> LanguageModel:
        """The language model that scores.

        Raises:
            InputError: the compressor is bound to none.
        """
        lm = getattr(self, "lm", None)
        if lm is None:
            raise InputError(f"{self.name} scores with a language model: call bind(model, tokenizer) first")
        return lm

    def options(self) -> dict[str, Any]:
        """The method's options by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def fingerprint(self) -> str:
        """The method and its options, in one line."""
        lm = getattr(self, "lm", None)
        return f"{self!r}" if lm is None or lm.own else f"{self!r} scored by {lm.name}"

    def own_target(self, tokens: int) -> int:
        """Tokens that the options leave of a prompt of `tokens` tokens."""
        if self.kept_tokens is not None:
            return min(self.kept_tokens, tokens)
        return share_of(tokens, self.keep_ratio or self.default_ratio)

    def question_from(self, ids: list[int]) -> Question:
        """The question that the tail `ids` of a prompt asks."""
        return Question(ids, question_of(self.tokenizer, ids))

    @torch.no_grad()
    def compress(self, ids: list[int], kept_tokens: int, question: Question | None = None) -> Kept:
        """What stays of a prompt's tokens.

        Args:
            ids: the prompt without the question.
            kept_tokens: of them to keep at most. The chat template's header and the tokenizer's marks are among them.

        Raises:
            BudgetError: the prompt's frame alone is more.
            InputError: the method needs a question and has none, or the compressor is not bound.
        """
        if not hasattr(self, "tokenizer"):
            raise InputError(f"{self.name} is bound to no tokenizer: call bind(model, tokenizer) first")
        if self.query_aware and (question is None or not question.text):
            raise UnsupportedFeatureError(
                f"{self.name} compresses for a question, and there is none: say what it is with generate(..., "
                "question_tokens=n), compress(..., question_ids=...) or compress_text(..., question=...)"
            )
        if len(ids) <= kept_tokens:
            return Kept(list(ids), list(range(len(ids))))
        passage = Passage.of(self.tokenizer, ids)
        frame = fixed(passage)
        room = kept_tokens - sum(frame)
        if room < 0:
            raise BudgetError(
                f"{self.name}: the chat template's own tokens are {sum(frame):,} and the context may have "
                f"{kept_tokens:,}; the smallest budget that would do has {-room:,} tokens more"
            )
        made = Kept([], [])
        if room:
            made = self.make(passage, [not kept for kept in frame], question, room)
        pairs = [(place, identity) for identity, place in zip(*made, strict=True)]
        pairs += [(place, ids[place]) for place, kept in enumerate(frame) if kept]
        pairs.sort(key=lambda pair: pair[0])
        return Kept([identity for _, identity in pairs], [place for place, _ in pairs])

    def compress_text(
        self,
        text: str,
        question: str | None = None,
        kept_tokens: int | None = None,
        keep_ratio: float | None = None,
    ) -> CompressedText:
        """A text by itself, made shorter.

        Args:
            question: what it will be asked.
            kept_tokens, keep_ratio: how much of it stays, by the bound tokenizer; the options' own if both are left
                out.

        Raises:
            InputError, UnsupportedFeatureError: as for `compress`; or both sizes, or a size below 1.
        """
        if kept_tokens is not None and keep_ratio is not None:
            raise InputError("give kept_tokens or keep_ratio, not both")
        if kept_tokens is not None and kept_tokens < 1:
            raise InputError(f"kept_tokens={kept_tokens}; it has to be at least 1")
        if keep_ratio is not None and not 0 < keep_ratio <= 1:
            raise InputError(f"keep_ratio={keep_ratio}; it has to be above 0 and at most 1")
        ids = self._encoded(text)
        if keep_ratio is not None:
            kept_tokens = int(len(ids) * keep_ratio + 1e-9)
        limit = self.own_target(len(ids)) if kept_tokens is None else kept_tokens
        asked = None if not question else Question(self._encoded(question), question.strip())
        if len(ids) <= limit:
            self.compress(ids, limit, asked)
            return CompressedText(text, [(0, len(text))] if text else [], len(ids), len(ids))
        target, best = limit, CompressedText("", [], 0, len(ids))
        for _ in range(4):  # what is kept may be cut into tokens otherwise than it was
            made = self.compress(ids, target, asked)
            shown, spans = self._shown(ids, made)
            n = len(self._encoded(shown))
            if best.kept_tokens < n <= limit:
                best = CompressedText(shown, spans, n, len(ids))
            if n <= limit and (limit - n <= limit // 100 or n < target):
                break
            target = max(1, target - max(1, n - limit))
        return best

    def _encoded(self, text: str) -> list[int]:
        if not hasattr(self, "tokenizer"):
            raise InputError(f"{self.name} is bound to no tokenizer: call bind(model, tokenizer) first")
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _shown(self, ids: list[int], made: Kept) -> tuple[str, list[tuple[int, int]]]:
        """The kept text, and the stretches of the source that it comes from."""
        passage = Passage.of(self.tokenizer, ids)
        places = sorted(set(made.places))
        spans = passage.spans(places)
        if [ids[place] for place in made.places] != made.ids:
            return self.tokenizer.decode(made.ids, skip_special_tokens=True).strip(), spans
        text = ""
        for start, stop in spans:
            piece = passage.text[start:stop]
            apart = text and not text[-1].isspace() and not piece[0].isspace()
            text += (" " if apart and not spaceless(text[-1]) and not spaceless(piece[0]) else "") + piece
        return text.strip(), spans


def available() -> dict[str, type[PromptCompressor]]:
    """All registered prompt compressors by name."""
    return dict(sorted(_REGISTRY.items()))

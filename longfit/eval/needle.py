"""Needle in a haystack, in RULER's form (Hsieh et al. 2024, arXiv:2404.06654; NVIDIA/RULER, ``niah.py``).

``niah_single`` is RULER's ``niah_single_2`` and ``niah_multikey`` its ``niah_multikey_1``: an essay haystack,
adjective-noun keys, 7-digit values, RULER's template and answer prefix. Deviations, all on purpose:

- The asked needle's depth is stratified over the samples (RULER draws it), in an order that keeps every
  prefix of the samples spread out, so that few samples, or an interrupted run, still cover all depths.
- Each sample reads another passage of the essays (RULER: always their beginning), so an interval over
  samples also speaks about haystacks.
- The answer may take 16 tokens and ends with the first 7-digit number (RULER: 128 tokens). Listing every
  number of the text therefore does not count as an answer.
- Sentences are split by a regular expression (RULER: nltk punkt).
"""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longfit.errors import DataError, InputError
from longfit.eval.sample import Prompt, Sample, frame, in_template, tokens_of
from longfit.eval.task import Task

MAX_NEW_TOKENS = 16
INTRO = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = "What is the special magic number for {key} mentioned in the provided text?"
ANSWER_PREFIX = " The special magic number for {key} mentioned in the provided text is"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ADJECTIVES = ["abundant", "brave", "calm", "distant", "eager", "fancy", "gentle", "humble", "jolly", "keen"]
NOUNS = ["anchor", "basket", "candle", "desert", "engine", "forest", "garden", "harbor", "island", "jacket"]
_ANSWER = re.compile(r"\d{7}")


@dataclass(frozen=True)
class Haystack:
    """The text that hides the needles: its words, what joins its sentences, and where it came from."""

    words: tuple[str, ...]
    joiner: str
    source: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(" ".join(self.words).encode()).hexdigest()

    def sentences(self, start: int, count: int) -> list[str]:
        """The sentences of ``count`` words from word ``start`` on, wrapping round at the end of the text."""
        words = [self.words[(start + offset) % len(self.words)] for offset in range(count)]
        return re.split(r"(?<=[.!?])\s+", " ".join(words)) if words else []


def load_haystack(data: str | Path | None) -> Haystack:
    """The essays (or any ``.txt`` files) of a local data folder; RULER's noise sentences where it is None.

    Raises InputError where the folder does not exist or holds no text, DataError where the essays are broken.
    """
    if data is None:
        return Haystack(tuple(NOISE.split()), "\n", "noise")
    folder = Path(data)
    if not folder.is_dir():
        raise InputError(f"data folder {str(data)!r} does not exist; give a folder of .txt files, or no folder")
    for root in (folder / "ruler", folder):
        if (essays := root / "PaulGrahamEssays.json").is_file():
            return _haystack(_essay_text(essays), essays.name)
        if files := sorted((root / "paul_graham_essays").glob("*.txt")):
            return _haystack(_join(files), "paul_graham_essays")
    files = sorted(folder.glob("*.txt")) or sorted(f for f in folder.rglob("*.txt") if "wonderwords" not in f.parts)
    if not files:
        raise InputError(f"data folder {str(data)!r} holds no text: expected .txt files or ruler/PaulGrahamEssays.json")
    return _haystack(_join(files), f"{len(files)} text files")


def _essay_text(file: Path) -> str:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["text"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{file} is broken ({error!r}); expected a JSON object {{"text": ...}}') from error


def _join(files: Iterable[Path]) -> str:
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def _haystack(text: str, source: str) -> Haystack:
    words = tuple(text.split())
    if not words:
        raise InputError(f"the haystack {source!r} is empty")
    return Haystack(words, " ", source)


def load_words(data: str | Path | None) -> tuple[list[str], list[str]]:
    """Adjectives and nouns for the keys: the newest wonderwords lists of the folder, or the built-in ones."""
    lists = []
    for name, builtin in (("adjectivelist.txt", ADJECTIVES), ("nounlist.txt", NOUNS)):
        files = sorted(Path(data).glob(f"**/wonderwords/**/{name}")) if data is not None else []
        words = files[-1].read_text(encoding="utf-8").split("\n") if files else builtin
        lists.append(sorted({word.strip() for word in words if word.strip()}))
    return lists[0], lists[1]


def stratum(index: int, n: int) -> int:
    """The stratum 0..n-1 that sample ``index`` of ``n`` visits: van der Corput order, a permutation."""
    width = max(1, (n - 1).bit_length())
    order = sorted(range(n), key=lambda i: int(f"{i:0{width}b}"[::-1], 2))
    return order.index(index)


def score(answer: str, answers: Sequence[str]) -> float:
    """RULER's ``string_match_all``: the share of ``answers`` found in the text, ignoring case, in 0..1."""
    text = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()
    return sum(wanted.lower() in text for wanted in answers) / len(answers)


def complete(answer: str) -> bool:
    """Whether the answer already holds a whole value, so that no further token can make it another one."""
    return _ANSWER.search(answer) is not None


class NeedleTask(Task):
    """One asked needle among `needles`. `details` of a sample: `depth` of the asked needle in the haystack, 0 the
    beginning and 1 the end; `haystack_tokens` and `needle_tokens`, half-open spans in the context, the asked first.
    """

    suite = "needle"
    metric = "string_match_all"

    def __init__(self, name: str, needles: int) -> None:
        self.name, self.needles = name, needles

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
        haystack, (adjectives, nouns) = load_haystack(data), load_words(data)
        samples = []
        for index in range(n):
            rng = random.Random(f"{self.name}/{seed}/{index}")
            keys: list[str] = []
            while len(keys) < self.needles:
                key = f"{rng.choice(adjectives)}-{rng.choice(nouns)}"
                keys += [key] if key not in keys else []
            values = [str(value) for value in rng.sample(range(1_000_000, 10_000_000), len(keys))]
            # Distractors at RULER's 40 depths; the asked needle, first, in its own stratum.
            depths = [(stratum(index, n) + 0.5) / n] + [step / 39 for step in rng.sample(range(40), len(keys) - 1)]
            needles = [NEEDLE.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
            question, prefix = QUESTION.format(key=keys[0]), ANSWER_PREFIX.format(key=keys[0])
            before, after = frame(tokenizer, INTRO, question, answer_prefix=prefix, chat=chat)
            start = rng.randrange(len(haystack.words))
            opening = not in_template(tokenizer, chat)
            build = _Builder(tokenizer, haystack, start, needles, depths, before, after, opening)
            samples.append(build.sample(self.name, index, (values[0],), length - MAX_NEW_TOKENS))
        return samples

    def score(self, prediction: str, sample: Sample) -> float:
        return score(prediction, sample.answers)

    def settled(self, prediction: str, sample: Sample) -> bool:
        return complete(prediction)


TASKS = {name: NeedleTask(name, needles) for name, needles in (("niah_single", 1), ("niah_multikey", 4))}


@dataclass
class _Builder:
    """One sample in the making: everything is fixed but the number of haystack words."""

    tokenizer: Any
    haystack: Haystack
    start: int
    needles: list[str]
    depths: list[float]
    before: str
    after: str
    opening: bool

    def sample(self, task: str, index: int, answers: tuple[str, ...], budget_tokens: int) -> Sample:
        """The largest haystack whose whole prompt has at most ``budget_tokens`` tokens."""
        question_ids = tokens_of(self.tokenizer, self.after, False)
        room = budget_tokens - len(question_ids)
        low, high = 1, max(2, budget_tokens)
        if len(self._ids(self._context(low)[0])) > room:
            least = len(self._ids(self._context(low)[0])) + len(question_ids) + MAX_NEW_TOKENS
            raise InputError(
                f"{task} does not fit into {budget_tokens + MAX_NEW_TOKENS} tokens: its template, needles and answer "
                f"need {least}; raise the length"
            )
        while high - low > 1:
            middle = (low + high) // 2
            if len(self._ids(self._context(middle)[0])) <= room:
                low = middle
            else:
                high = middle
        context, spans = self._context(low)
        empty = self._ids(self.before)
        haystack_span = (len(self.before), len(context) - 1)
        tokens = [self._tokens(context, span) for span in [haystack_span, *spans]]
        return Sample(
            suite="needle",
            task=task,
            index=index,
            prompt=Prompt(context, self.after, self._ids(context), question_ids, empty),
            answers=answers,
            max_new_tokens=MAX_NEW_TOKENS,
            details={"depth": self.depths[0], "haystack_tokens": tokens[0], "needle_tokens": tokens[1:]},
        )

    def _context(self, words: int) -> tuple[str, list[tuple[int, int]]]:
        """The context with a haystack of ``words`` words, and each needle's character span in it."""
        sentences = self.haystack.sentences(self.start, words)
        places = [min(len(sentences), int(len(sentences) * depth)) for depth in self.depths]
        order = sorted(range(len(places)), key=lambda i: places[i])
        pieces, spans, position = [], [(0, 0)] * len(places), len(self.before)
        for at in range(len(sentences) + 1):
            while order and places[order[0]] == at:
                needle = order.pop(0)
                spans[needle] = (position, position + len(self.needles[needle]))
                pieces.append(self.needles[needle])
                position += len(pieces[-1]) + len(self.haystack.joiner)
            if at < len(sentences):
                pieces.append(sentences[at])
                position += len(pieces[-1]) + len(self.haystack.joiner)
        return self.before + self.haystack.joiner.join(pieces) + "\n", spans

    def _ids(self, text: str) -> tuple[int, ...]:
        return tokens_of(self.tokenizer, text, self.opening)

    def _tokens(self, text: str, span: tuple[int, int]) -> list[int]:
        """The half-open token span that covers the characters of ``span``."""
        if not getattr(self.tokenizer, "is_fast", False):
            return [len(self._ids(text[: span[0]])), len(self._ids(text[: span[1]]))]
        encoded = self.tokenizer(text, add_special_tokens=self.opening, return_offsets_mapping=True)
        inside = [i for i, (start, stop) in enumerate(encoded["offset_mapping"]) if start < span[1] and stop > span[0]]
        return [inside[0], inside[-1] + 1]

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

from longfit.errors import InputError, UnknownNameError

TASKS = {"niah_single": 1, "niah_multikey": 4}  # task -> needles in the text, one of which is asked
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
_SPLIT = "[[longfit: the context ends here]]"
_ANSWER = re.compile(r"\d{7}")


@dataclass(frozen=True)
class NeedleSample:
    """One prompt, cut where the context ends and the question begins.

    ``context_ids + question_ids`` is exactly the prompt. ``haystack_tokens`` and ``needle_tokens`` are
    half-open spans ``(start, stop)`` in ``context_ids``; the asked needle comes first. ``depth`` is the asked
    needle's place in the haystack, 0 the beginning and 1 the end. ``sha256`` covers ids and answers.
    """

    task: str
    index: int
    context: str
    question: str
    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    answers: tuple[str, ...]
    depth: float
    haystack_tokens: tuple[int, int]
    needle_tokens: tuple[tuple[int, int], ...]
    sha256: str

    @property
    def sample_id(self) -> str:
        return f"{self.task}-{self.index:04d}"

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.context_ids + self.question_ids


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

    Raises InputError where the folder does not exist or holds no text.
    """
    if data is None:
        return Haystack(tuple(NOISE.split()), "\n", "noise")
    folder = Path(data)
    if not folder.is_dir():
        raise InputError(f"data folder {str(data)!r} does not exist; give a folder of .txt files, or no folder")
    for root in (folder / "ruler", folder):
        if (essays := root / "PaulGrahamEssays.json").is_file():
            return _haystack(json.loads(essays.read_text(encoding="utf-8"))["text"], essays.name)
        if files := sorted((root / "paul_graham_essays").glob("*.txt")):
            return _haystack(_join(files), "paul_graham_essays")
    files = sorted(folder.glob("*.txt")) or sorted(f for f in folder.rglob("*.txt") if "wonderwords" not in f.parts)
    if not files:
        raise InputError(f"data folder {str(data)!r} holds no text: expected .txt files or ruler/PaulGrahamEssays.json")
    return _haystack(_join(files), f"{len(files)} text files")


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


def generate(
    task: str,
    tokenizer: Any,
    *,
    length: int,
    n: int,
    seed: int = 42,
    data: str | Path | None = None,
    answer_prefix: bool = True,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[NeedleSample]:
    """``n`` samples of ``task`` (see ``TASKS``) whose prompt plus ``max_new_tokens`` fills ``length`` tokens.

    ``length`` counts, as RULER does, the chat template, question and answer prefix too. ``data`` is a local
    folder of text (``load_haystack``). The same arguments give the same samples, whatever their order of use.
    Raises UnknownNameError for an unknown task, InputError where ``length`` cannot hold the needles.
    """
    if task not in TASKS:
        raise UnknownNameError(f"unknown needle task {task!r}; there are {', '.join(TASKS)}")
    if n < 1:
        raise InputError(f"n={n}: ask for at least one sample")
    haystack, (adjectives, nouns) = load_haystack(data), load_words(data)
    samples = []
    for index in range(n):
        rng = random.Random(f"{task}/{seed}/{index}")
        keys: list[str] = []
        while len(keys) < TASKS[task]:
            key = f"{rng.choice(adjectives)}-{rng.choice(nouns)}"
            keys += [key] if key not in keys else []
        values = [str(value) for value in rng.sample(range(1_000_000, 10_000_000), len(keys))]
        # Distractors at RULER's 40 depths; the asked needle, first, in its own stratum.
        depths = [(stratum(index, n) + 0.5) / n] + [step / 39 for step in rng.sample(range(40), len(keys) - 1)]
        frame = _frame(tokenizer, keys[0], answer_prefix)
        needles = [NEEDLE.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
        build = _Builder(tokenizer, haystack, rng.randrange(len(haystack.words)), needles, depths, *frame)
        samples.append(build.sample(task, index, (values[0],), length - max_new_tokens))
    return samples


def _frame(tokenizer: Any, key: str, answer_prefix: bool) -> tuple[str, str]:
    """The prompt before the haystack and after it, chat template included where the tokenizer has one."""
    text = INTRO + _SPLIT + QUESTION.format(key=key)
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if text.count(_SPLIT) != 1:
        raise InputError("the chat template drops or repeats the user's text; the prompt cannot be split")
    before, after = text.split(_SPLIT)
    return before, after + (ANSWER_PREFIX.format(key=key) if answer_prefix else "")


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

    def sample(self, task: str, index: int, answers: tuple[str, ...], budget_tokens: int) -> NeedleSample:
        """The largest haystack whose whole prompt has at most ``budget_tokens`` tokens."""
        # With a chat template the text already holds the model's own opening tokens.
        opening = not getattr(self.tokenizer, "chat_template", None)
        question_ids = self._ids(self.after, False)
        room = budget_tokens - len(question_ids)
        low, high = 1, max(2, budget_tokens)
        if len(self._ids(self._context(low)[0], opening)) > room:
            raise InputError(f"{budget_tokens} tokens cannot hold {task}'s template and needles; raise the length")
        while high - low > 1:
            middle = (low + high) // 2
            if len(self._ids(self._context(middle)[0], opening)) <= room:
                low = middle
            else:
                high = middle
        context, spans = self._context(low)
        context_ids = self._ids(context, opening)
        haystack_span = (len(self.before), len(context) - 1)
        tokens = [self._tokens(context, span, opening) for span in [haystack_span, *spans]]
        digest = hashlib.sha256(json.dumps([context_ids, question_ids, answers]).encode()).hexdigest()
        return NeedleSample(
            task=task,
            index=index,
            context=context,
            question=self.after,
            context_ids=tuple(context_ids),
            question_ids=tuple(question_ids),
            answers=answers,
            depth=self.depths[0],
            haystack_tokens=tokens[0],
            needle_tokens=tuple(tokens[1:]),
            sha256=digest,
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

    def _ids(self, text: str, opening: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=opening)["input_ids"])

    def _tokens(self, text: str, span: tuple[int, int], opening: bool) -> tuple[int, int]:
        """The half-open token span that covers the characters of ``span``."""
        if not getattr(self.tokenizer, "is_fast", False):
            return len(self._ids(text[: span[0]], opening)), len(self._ids(text[: span[1]], opening))
        offsets = self.tokenizer(text, add_special_tokens=opening, return_offsets_mapping=True)["offset_mapping"]
        inside = [i for i, (start, stop) in enumerate(offsets) if start < span[1] and stop > span[0]]
        return inside[0], inside[-1] + 1

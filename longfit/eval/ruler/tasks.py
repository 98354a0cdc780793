"""RULER's 13 tasks: samples of any length, and the official scores."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longfit.errors import UnknownNameError
from longfit.eval.names import nearest
from longfit.eval.ruler import inputs
from longfit.eval.ruler.common_words import CommonWordsMaker
from longfit.eval.ruler.draft import Draft, Maker, Surroundings, drafts
from longfit.eval.ruler.frequent_words import frequent_words_drafts
from longfit.eval.ruler.niah import NiahArguments, NiahMaker
from longfit.eval.ruler.qa import QaMaker
from longfit.eval.ruler.variable_tracking import TrackingMaker
from longfit.eval.sample import Prompt, Sample, in_template
from longfit.eval.task import Task

NIAH: Mapping[str, NiahArguments] = {
    "niah_single_1": NiahArguments("noise"),
    "niah_single_2": NiahArguments("essay"),
    "niah_single_3": NiahArguments("essay", value_kind="uuids"),
    "niah_multikey_1": NiahArguments("essay", keys=4),
    "niah_multikey_2": NiahArguments("needle"),
    "niah_multikey_3": NiahArguments("needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": NiahArguments("essay", values=4),
    "niah_multiquery": NiahArguments("essay", asked=4),
}


class RulerTask(Task):
    """One task. A subclass makes the drafts.

    Attributes:
        answer_tokens: RULER's ``tokens_to_generate``.
    """

    suite = "ruler"

    def __init__(self, name: str, answer_tokens: int, minimum_length: int, metric: str = "string_match_all") -> None:
        self.name, self.answer_tokens, self.minimum_length, self.metric = name, answer_tokens, minimum_length, metric

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
        around = Surroundings.of(tokenizer, chat)
        made = self.drafts(around, length, n, seed, data)
        return [self._sample(around, index, draft) for index, draft in enumerate(made)]

    def drafts(self, around: Surroundings, length: int, n: int, seed: int, data: str | Path | None) -> list[Draft]:
        return drafts(self.maker(around, length, seed, data), around, self.name, n, length, self.answer_tokens)

    def maker(self, around: Surroundings, length: int, seed: int, data: str | Path | None) -> Maker:
        raise NotImplementedError

    def _sample(self, around: Surroundings, index: int, draft: Draft) -> Sample:
        prompt = around.prompt(draft)
        details = needle_details(around, draft, prompt) if draft.needles else {}
        return Sample(self.suite, self.name, index, prompt, draft.answers, self.answer_tokens, details=details)

    def score(self, prediction: str, sample: Sample) -> float:
        return score(self.name, prediction, sample.answers)

    def settled(self, prediction: str, sample: Sample) -> bool:
        return self.score(prediction, sample) == 1.0


class NiahTask(RulerTask):
    """`details` of a sample: `depths` of the asked needles in the content (0 its beginning, 1 its end) in the order of
    the answers, `depth` the first of them, and `needle_tokens`, their half-open spans in the context."""

    def maker(self, around: Surroundings, length: int, seed: int, data: str | Path | None) -> Maker:
        arguments, pairs = NIAH[self.name], inputs.pairs(inputs.word_lists(data))
        if arguments.haystack == "essay":
            hay = (inputs.essay(data), inputs.sentence_splitter(data))
        else:
            hay = ((), str.splitlines)
        return NiahMaker(arguments, around, length, seed, pairs, *hay)


class TrackingTask(RulerTask):
    def maker(self, around: Surroundings, length: int, seed: int, data: str | Path | None) -> Maker:
        return TrackingMaker(around, length, seed)


class CommonWordsTask(RulerTask):
    def maker(self, around: Surroundings, length: int, seed: int, data: str | Path | None) -> Maker:
        words = inputs.word_lists(data).shuffled(seed)
        return CommonWordsMaker(around, length, seed, words, lambda: inputs.english_words(data))


class FrequentWordsTask(RulerTask):
    def drafts(self, around: Surroundings, length: int, n: int, seed: int, data: str | Path | None) -> list[Draft]:
        return frequent_words_drafts(around, n, length, self.answer_tokens, seed)


class QaTask(RulerTask):
    """The questions of the data set in its order, so that there are at most as many samples."""

    def drafts(self, around: Surroundings, length: int, n: int, seed: int, data: str | Path | None) -> list[Draft]:
        documents = inputs.squad_documents(data) if self.name == "qa_1" else inputs.hotpotqa_documents(data)
        maker = QaMaker(around, seed, documents)
        return drafts(maker, around, self.name, min(n, len(documents.questions)), length, self.answer_tokens)


TASKS: dict[str, Task] = {
    **{name: NiahTask(name, 128, 2048 if arguments.haystack == "essay" else 1024) for name, arguments in NIAH.items()},
    "vt": TrackingTask("vt", 30, 1024),
    "cwe": CommonWordsTask("cwe", 120, 1024),
    "fwe": FrequentWordsTask("fwe", 50, 512),
    "qa_1": QaTask("qa_1", 32, 4096, "string_match_part"),
    "qa_2": QaTask("qa_2", 32, 4096, "string_match_part"),
}


def _named(task: str) -> Task:
    if task not in TASKS:
        raise UnknownNameError(f"RULER has no task {task!r}{nearest(task, TASKS)}")
    return TASKS[task]


def generate(
    task: str,
    tokenizer: Any,
    length: int = 4096,
    n: int = 100,
    seed: int = 42,
    data: str | Path | None = None,
    chat: bool = True,
) -> list[Sample]:
    """``n`` samples of a task; see `longfit.eval.task.Task.samples`.

    Raises:
        UnknownNameError: RULER has no such task.
        DataError: an input file is missing or broken.
        InputError: ``length`` is below what the task needs.
    """
    return _named(task).samples(tokenizer, length=length, n=n, seed=seed, data=data, chat=chat)


def score(task: str, prediction: str, answers: Sequence[str]) -> float:
    """The official score of one prediction in 0..1 (``scripts/eval``): references found as substrings, ignoring case.

    All but qa: the share of ``answers`` found (string_match_all). qa: whether any is found (string_match_part).

    Raises:
        UnknownNameError: RULER has no such task.
    """
    text = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    found = [answer.lower() in text for answer in answers]
    return float(any(found)) if _named(task).metric == "string_match_part" else sum(found) / len(found)


def needle_details(around: Surroundings, draft: Draft, prompt: Prompt) -> dict[str, Any]:
    """Where the asked needles of ``draft`` lie; see `NiahTask`."""
    starts = [draft.content.index(needle) for needle in draft.needles]
    shift = len(prompt.context) - len(draft.content)
    spans = [(shift + at, shift + at + len(needle)) for at, needle in zip(starts, draft.needles, strict=True)]
    room = [max(1, len(draft.content) - 1 - len(needle)) for needle in draft.needles]
    depths = [at / whole for at, whole in zip(starts, room, strict=True)]
    tokens = token_spans(around, prompt.context, spans)
    return {"depth": depths[0], "depths": depths, "needle_tokens": tokens}


def token_spans(around: Surroundings, text: str, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The half-open token spans in ``text`` that cover the characters of ``spans``."""
    opening = not in_template(around.tokenizer, around.chat)
    if not getattr(around.tokenizer, "is_fast", False):
        ids = [
            [around.tokenizer(text[:end], add_special_tokens=opening)["input_ids"] for end in span] for span in spans
        ]
        return [[len(start), len(stop)] for start, stop in ids]
    encoded = around.tokenizer(text, add_special_tokens=opening, return_offsets_mapping=True)
    found = []
    for first, last in spans:
        inside = [i for i, (start, stop) in enumerate(encoded["offset_mapping"]) if start < last and stop > first]
        found.append([inside[0], inside[-1] + 1])
    return found

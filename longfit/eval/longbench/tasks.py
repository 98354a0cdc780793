"""LongBench's 21 tasks, LongBench-E's 13 and LongBench v2, as `Task`s.

Deviations from THUDM/LongBench:

- `length` is the model's context; a prompt is cut to ``length - 500``, where the official 3,500, 7,500, 15,500 and
  31,500 are 4,000, 8,000, 16,000 and 32,000 less 500. v2 follows the same rule: its official 120,000 is length 120,500.
  Tokens of the chat wrapper are not counted, as officially: a 512-token summary may pass `length` by the wrapper.
- Context and question are tokenised apart, so a token never spans the cut between them.
- A classification is scored against its row's classes (``eval.py``: the last row's; they are equal).
- samsum officially forbids a newline as the first token; here leading newlines are passed over, as its scorer does.
- v2 is officially sampled at temperature 0.1; here decoding is the caller's, which is greedy.
- The chat wrapper is the tokenizer's own template, not the original's hand-written ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longfit.errors import InputError, UnknownNameError
from longfit.eval.longbench import metrics, v2
from longfit.eval.longbench.data import Row, load_rows, load_v2_rows
from longfit.eval.longbench.prompts import MAX_NEW_TOKENS, Parts, fill, fill_v2, shorten
from longfit.eval.names import nearest
from longfit.eval.sample import Sample, make_prompt
from longfit.eval.task import Task

FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
PLAIN = (*FIRST_LINE, "lcc", "repobench-p")  # never in a chat template
V2_MAX_NEW_TOKENS = 128
_V2 = "longbench_v2"

METRICS: dict[str, metrics.Metric] = {
    **dict.fromkeys(["narrativeqa", "qasper", "multifieldqa_en"], metrics.qa_f1),
    "multifieldqa_zh": metrics.qa_f1_zh,
    **dict.fromkeys(["hotpotqa", "2wikimqa", "musique"], metrics.qa_f1),
    "dureader": metrics.rouge_zh,
    **dict.fromkeys(["gov_report", "qmsum", "multi_news"], metrics.rouge_l),
    "vcsum": metrics.rouge_zh,
    "trec": metrics.classification,
    "triviaqa": metrics.qa_f1,
    "samsum": metrics.rouge_l,
    "lsht": metrics.classification,
    "passage_count": metrics.count,
    "passage_retrieval_en": metrics.retrieval,
    "passage_retrieval_zh": metrics.retrieval_zh,
    **dict.fromkeys(["lcc", "repobench-p"], metrics.code_sim),
}
E_NAMES = [
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
]


class RowTask(Task):
    """A task whose samples are the rows of its data, in their order. A subclass reads the rows and fills a prompt."""

    def samples(
        self,
        tokenizer: Any,
        *,
        length: int,
        n: int | None = None,
        seed: int = 42,
        data: str | Path | None = None,
        chat: bool = True,
    ) -> list[Sample]:
        """The first `n` rows in file order, or all; `seed` changes nothing. Raises as `Task.samples`."""
        rows = self.rows(data)[: _checked(n)]
        return [self._sample(tokenizer, index, row, length, chat) for index, row in enumerate(rows)]

    def rows(self, data: str | Path | None) -> list[Row]:
        raise NotImplementedError

    def _sample(self, tokenizer: Any, index: int, row: Row, length: int, chat: bool) -> Sample:
        raise NotImplementedError


class LongBenchTask(RowTask):
    """One v1 task, or with `suite` "longbench_e" its evenly distributed twin.

    `details` of a sample: `row_id`, `words` (the data's own length), `bucket` of LongBench-E, `language`,
    `all_classes`, `reconstructed` (a row rebuilt from a published prompt: its words may be off by a few),
    `truncated`, `question_cut` (the cut took the question's beginning), `question_before_context` (no template has it).
    """

    suite = "longbench"

    def __init__(self, base: str) -> None:
        self.base = self.name = base
        self.metric = METRICS[base].__name__

    def rows(self, data: str | Path | None) -> list[Row]:
        return load_rows(self.name, data)

    def _sample(self, tokenizer: Any, index: int, row: Row, length: int, chat: bool) -> Sample:
        parts = shorten(tokenizer, fill(self.base, row), length)
        prompt = make_prompt(tokenizer, parts.head, parts.content, parts.tail, chat=chat and self.base not in PLAIN)
        details = {
            **_details(row, parts),
            "words": row["length"],
            "bucket": bucket(row["length"]),
            "language": row.get("language"),
            "all_classes": row.get("all_classes"),
            "reconstructed": bool(row.get("_reconstructed", False)),
        }
        return Sample(
            self.suite, self.name, index, prompt, tuple(row["answers"]), MAX_NEW_TOKENS[self.base], details=details
        )

    def score(self, prediction: str, sample: Sample) -> float:
        return score(self.name, prediction, sample.answers, sample.details["all_classes"])

    def settled(self, prediction: str, sample: Sample) -> bool:
        lines = prediction.lstrip("\n").split("\n")
        if self.base in FIRST_LINE:
            return len(lines) > 1
        return METRICS[self.base] is metrics.code_sim and any(map(metrics.is_code, lines[:-1]))


class LongBenchETask(LongBenchTask):
    """A task of LongBench-E; the file is ``<task>_e.jsonl``."""

    suite = "longbench_e"

    def __init__(self, base: str) -> None:
        super().__init__(base)
        self.name = f"{base}_e"


class LongBenchV2Task(RowTask):
    """LongBench v2's four-way questions, zero-shot. `details` of a sample: `row_id`, `domain`, `sub_domain`,
    `difficulty` (easy, hard), `length_category` (short, medium, long), `truncated`, `question_cut`,
    `question_before_context`.
    """

    suite = "longbench_v2"
    name = _V2
    metric = "accuracy"
    chance = v2.CHANCE

    def rows(self, data: str | Path | None) -> list[Row]:
        return load_v2_rows(data)

    def _sample(self, tokenizer: Any, index: int, row: Row, length: int, chat: bool) -> Sample:
        parts = shorten(tokenizer, fill_v2(row), length, halves_apart=False)
        prompt = make_prompt(tokenizer, parts.head, parts.content, parts.tail, chat=chat)
        details = {
            **_details(row, parts),
            **{name: row.get(name) for name in ("domain", "sub_domain", "difficulty")},
            "length_category": row["length"],
        }
        return Sample(self.suite, self.name, index, prompt, (row["answer"],), V2_MAX_NEW_TOKENS, details=details)

    def score(self, prediction: str, sample: Sample) -> float:
        return v2.exact(prediction, sample.answers)

    def settled(self, prediction: str, sample: Sample) -> bool:
        return v2.answered(prediction)


TASKS: dict[str, Task] = {name: LongBenchTask(name) for name in METRICS}
E_TASKS: dict[str, Task] = {f"{name}_e": LongBenchETask(name) for name in E_NAMES}
V2_TASKS: dict[str, Task] = {_V2: LongBenchV2Task()}


def generate(
    task: str,
    tokenizer: Any,
    length: int = 4096,
    n: int | None = None,
    seed: int = 42,
    data: str | Path | None = None,
    chat: bool = True,
) -> list[Sample]:
    """The samples of a task of any of the three suites: the first `n` rows in file order, or all.

    Raises:
        UnknownNameError: there is no such task.
        DataError, InputError: as `Task.samples`.
    """
    known = TASKS | E_TASKS | V2_TASKS
    found: Any = known[_known(task, list(known))]
    samples: list[Sample] = found.samples(tokenizer, length=length, n=n, seed=seed, data=data, chat=chat)
    return samples


def score(task: str, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None) -> float:
    """The best score of the prediction over `answers`, in 0..1; 0 where there are none (``eval.py``).

    Raises:
        UnknownNameError: there is no such task.
        InputError: a classification without `all_classes`.
    """
    base = _known(task, [*TASKS, *E_TASKS, *V2_TASKS]).removesuffix("_e")
    if base == _V2:
        return v2.exact(prediction, answers)
    if base in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max((METRICS[base](prediction, answer, all_classes) for answer in answers), default=0.0)


def bucket(words: int) -> str:
    """LongBench-E's bucket of a row by its own length."""
    return "0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"


def means_by(detail: str, scores: Sequence[float], samples: Sequence[Sample]) -> dict[str, float]:
    """The mean score of the samples of each value of a detail: `bucket`, `difficulty`, `length_category`, `domain`."""
    groups: dict[str, list[float]] = {}
    for value, sample in zip(scores, samples, strict=True):
        groups.setdefault(str(sample.details[detail]), []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(groups.items())}


def _details(row: Row, parts: Parts) -> dict[str, Any]:
    return {
        "row_id": row.get("_id"),
        "truncated": parts.truncated,
        "question_cut": parts.question_cut,
        "question_before_context": False,
    }


def _checked(n: int | None) -> int | None:
    if n is not None and n < 1:
        raise InputError(f"n is {n}; ask for at least one sample, or None for all")
    return n


def _known(task: str, names: list[str]) -> str:
    if task not in names:
        raise UnknownNameError(f"LongBench has no task {task!r}{nearest(task, names)}")
    return task

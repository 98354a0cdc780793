"""LongBench's metrics (THUDM/LongBench, ``LongBench/metrics.py``, MIT): one prediction against one reference, 0..1.

``code_sim`` is pinned to fuzzywuzzy 0.18.0 with python-Levenshtein, the scorer behind the published numbers that we
check against: it equals ``round(rapidfuzz.fuzz.ratio)``. fuzzywuzzy without python-Levenshtein falls back to difflib
and gives other values on about a third of strings; and fuzzywuzzy is GPL, so it is not used here.
"""

# ruff: noqa: RUF001
import functools
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from longfit.errors import DataError, InputError

Metric = Callable[[str, str, Sequence[str] | None], float]

_PUNCTUATION = set(string.punctuation)
_PUNCTUATION_ZH = _PUNCTUATION | set(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def qa_f1(prediction: str, answer: str, all_classes: Sequence[str] | None = None) -> float:
    """F1 of the words, without case, ASCII punctuation and articles."""
    return _f1(_words(prediction), _words(answer))


def qa_f1_zh(prediction: str, answer: str, all_classes: Sequence[str] | None = None) -> float:
    """F1 of jieba's tokens, without case, punctuation and white space."""
    return _f1(_tokens_zh(prediction), _tokens_zh(answer))


def rouge_l(prediction: str, answer: str, all_classes: Sequence[str] | None = None) -> float:
    """ROUGE-L F of the `rouge` package; 0 wherever that package fails, as for an empty prediction."""
    from rouge import Rouge

    try:
        return float(Rouge(metrics=["rouge-l"]).get_scores([prediction], [answer], avg=True)["rouge-l"]["f"])
    except Exception:  # the original catches all: an empty text, one of full stops, a sentence too long to recurse on
        return 0.0


def rouge_zh(prediction: str, answer: str, all_classes: Sequence[str] | None = None) -> float:
    """ROUGE-L of jieba's tokens."""
    cut = _jieba().cut
    return rouge_l(" ".join(cut(prediction, cut_all=False)), " ".join(cut(answer, cut_all=False)))


def classification(prediction: str, answer: str, all_classes: Sequence[str] | None = None) -> float:
    """1 over the number of class names in the prediction, where the answer is one of them.

    Raises:
        InputError: no classes were given.
    """
    if not all_classes:
        raise InputError("classification is scored against all classes of the task; give all_classes")
    found = [name for name in all_classes if name in prediction]
    # The original removes from the list that it walks and so skips the name after a removed one; published scores do.
    for name in found:
        if name in answer and name != answer:
            found.remove(name)
    return 1.0 / len(found) if answer in found else 0.0


def count(prediction: str, answer: str, all_classes: Sequence[str] | None = None) -> float:
    """The share of the prediction's numbers that are the answer; 0 without a number."""
    numbers = re.findall(r"\d+", prediction)
    return sum(number == answer for number in numbers) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str, all_classes: Sequence[str] | None = None) -> float:
    """`count` against the number of "Paragraph <number>"."""
    return count(prediction, _paragraph(r"Paragraph (\d+)", answer))


def retrieval_zh(prediction: str, answer: str, all_classes: Sequence[str] | None = None) -> float:
    """`count` against the number of "段落<number>"."""
    return count(prediction, _paragraph(r"段落(\d+)", answer))


def code_sim(prediction: str, answer: str, all_classes: Sequence[str] | None = None) -> float:
    """Edit similarity, in whole hundredths, of the prediction's first line that is neither comment nor fence."""
    from rapidfuzz import fuzz

    line = next(filter(is_code, prediction.lstrip("\n").split("\n")), "")
    return round(fuzz.ratio(line, answer)) / 100


def is_code(line: str) -> bool:
    """Whether `code_sim` counts a line; an empty one counts."""
    return not any(mark in line for mark in ("`", "#", "//"))


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    common = (Counter(prediction) & Counter(answer)).total()
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    plain = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _tokens_zh(text: str) -> list[str]:
    tokens = (
        "".join(
            character for character in token.lower() if character not in _PUNCTUATION_ZH and not character.isspace()
        )
        for token in _jieba().cut(text, cut_all=False)
    )
    return [token for token in tokens if token]


def _paragraph(pattern: str, answer: str) -> str:
    found = re.search(pattern, answer)
    if not found:
        raise DataError(f"a reference of a retrieval task reads like {pattern!r}, not {answer!r}")
    return found.group(1)


@functools.cache
def _jieba() -> Any:
    """jieba, imported when first used: its dictionary takes a second to load."""
    import jieba

    jieba.setLogLevel(logging.WARNING)
    return jieba

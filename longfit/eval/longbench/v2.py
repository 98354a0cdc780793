"""LongBench v2's answers: read from the model's text by the official expressions (``pred.py``, ``result.py``)."""

import re
from collections.abc import Sequence

CHANCE = 0.25
_ANSWER = re.compile(r"The correct answer is \(([A-D])\)")
_BARE_ANSWER = re.compile(r"The correct answer is ([A-D])")


def extract_answer(prediction: str) -> str | None:
    """The letter that the model chose; None where it named none in the asked form."""
    plain = prediction.replace("*", "")
    found = _ANSWER.search(plain) or _BARE_ANSWER.search(plain)
    return found.group(1) if found else None


def answered(prediction: str) -> bool:
    """Whether the choice is final: a letter in parentheses, which nothing later overrules."""
    return _ANSWER.search(prediction.replace("*", "")) is not None


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 for the right letter, 0 for a wrong one or none."""
    return float(extract_answer(prediction) in answers)


def compensated(prediction: str, answers: Sequence[str]) -> float:
    """`exact`, with chance instead of 0 where no letter was named: the official "compensated" score."""
    return CHANCE if extract_answer(prediction) is None else exact(prediction, answers)

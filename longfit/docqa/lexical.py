"""The check that an answer stands in a passage, by its words."""

from rapidfuzz import fuzz, process

from longfit.bm25 import terms

ALIKE = 85
LEAST_FUZZY = 5
# Words that say nothing by themselves.
STOPWORDS = """
a an and are as at be been but by can could did do does for from had has have he her him his i if in into is
it its may not of on or our she so some such that the their them then there these they this those to was we
were what when where which who whom whose why will with would you your yes no also s t how
"""


def stands_in(answer: str, passage: str, question: str = "", share: float = 0.8) -> bool:
    """Whether the names, numbers and other words that say something in an answer stand in a passage.

    Words of the question say nothing, unless the answer has no others. Long words may differ a little (an ending, a
    letter); numbers and short words may not, and every number has to be there. It is a check of words, not of sense: an
    answer that turns a sentence into its opposite passes.

    Args:
        share: the fraction of the words that has to be found.
    """
    stopwords = STOPWORDS.split()
    said = [word for word in dict.fromkeys(terms(answer)) if word not in stopwords]
    asked = terms(question)
    sought = [word for word in said if not _among(word, asked)] or said
    there = terms(passage)
    found = [_among(word, there) for word in sought]
    numbers = all(hit for word, hit in zip(sought, found, strict=True) if word[0].isdigit())
    return bool(sought) and numbers and sum(found) >= share * len(sought)


def _among(word: str, words: list[str]) -> bool:
    if word in words:
        return True
    if word[0].isdigit() or len(word) < LEAST_FUZZY:
        return False
    near = [other for other in words if len(other) >= LEAST_FUZZY]
    return process.extractOne(word, near, scorer=fuzz.ratio, score_cutoff=ALIKE) is not None

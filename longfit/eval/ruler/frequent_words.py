"""Frequent words: fwe (``scripts/data/synthetic/freq_words_extraction.py``), coded words with Zipf's counts."""

import math
import random
import string

import numpy as np

from longfit.errors import InputError
from longfit.eval.ruler.draft import Draft, Surroundings

HEAD = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
TAIL = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?"
)
ANSWER_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
WORD_LETTERS = 6
ALPHA = 2.0
ZETA = math.pi**2 / 6  # scipy.special.zeta(2.0), to the last bit


def frequent_words_drafts(around: Surroundings, n: int, length: int, answer_tokens: int, seed: int) -> list[Draft]:
    """``n`` drafts of at most ``length`` tokens with the answer.

    Raises:
        InputError: the template and the three answers do not fit.
    """
    room, rng = length - answer_tokens, random.Random(seed)
    step = room // 32
    vocabulary = _vocabulary(rng, room // 50, seed)
    words = room // WORD_LETTERS
    if step < 1 or len(vocabulary) < 4:
        raise InputError(f"fwe does not fit into {length} tokens; it needs at least {4 * 50 + answer_tokens}")
    while around.tokens(_draft(vocabulary, words, seed)) < room:
        words += step
    words -= step
    found = []
    for _ in range(n):
        vocabulary = _vocabulary(rng, room // 50, seed)
        used = words
        while used > 0 and around.tokens(_draft(vocabulary, used, seed)) > room:
            used -= step
        while used > 0 and _prompt_tokens(around, _draft(vocabulary, used, seed)) > room:
            used -= 1
        draft = _draft(vocabulary, used, seed)
        if not all(answer in draft.content for answer in draft.answers):
            least = around.tokens(_draft(vocabulary, 32, seed)) + answer_tokens
            raise InputError(f"fwe does not fit into {length} tokens; it needs about {max(least, length + 1)}")
        found.append(draft)
    return found


def _vocabulary(rng: random.Random, size: int, seed: int) -> list[str]:
    """Coded words in the order of their rank; the first stands for noise."""
    words = [_word(rng) for _ in range(size)]
    while len(set(words)) < size:
        words.append(_word(rng))
    ranked = sorted(set(words))
    random.Random(seed).shuffle(ranked)
    return ["...", *ranked[1:]]


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=WORD_LETTERS))


def _draft(vocabulary: list[str], words: int, seed: int) -> Draft:
    ranks = np.arange(1, len(vocabulary) + 1)
    counts = (words * (ranks**-ALPHA) / ZETA).astype(int)
    text = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
    random.Random(seed).shuffle(text)
    return Draft(HEAD, " ".join(text) + "\n", TAIL, ANSWER_PREFIX, tuple(vocabulary[1:4]))


def _prompt_tokens(around: Surroundings, draft: Draft) -> int:
    prompt = around.prompt(draft)
    return len(prompt.context_ids) + len(prompt.question_ids)

"""Perplexity of long texts: how well the tokens after a compressed context are predicted.

A sample is a window of ``length`` tokens of one document: a context, and the ``target_tokens`` that follow it. The
context's last token stands in the question, so that it is read after compression and the first target has logits.
Windows of a document do not overlap; samples go round the documents, in an order and at places set by the seed.

A window is cut from the document's tokens, not from its text, so the sizes are exact and a window may begin inside a
word. No chat template is used: the text is continued, not talked about.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longfit.errors import DataError, InputError, UnsupportedFeatureError
from longfit.eval.sample import Prompt, Sample, tokens_of
from longfit.eval.task import Task

BOOKS = (
    "plain-text books, one a file: <data>/text/books/*.txt, <data>/books/*.txt or <data>/*.txt; "
    "take them from Project Gutenberg (gutenberg.org) or Standard Ebooks (standardebooks.org)"
)
WIKITEXT = (
    'wikitext lines as JSON, {"text": ...} a line: wikitext*.jsonl in <data>/text/wiki, <data>/wiki or <data>; '
    "take wikitext-2-raw-v1 from the hub's Salesforce/wikitext"
)


@dataclass(frozen=True)
class Source:
    """Where a task's documents lie below the data folder: folders, tried in order, and a file pattern."""

    folders: tuple[str, ...]
    pattern: str
    wanted: str

    def files(self, data: str | Path | None) -> list[Path]:
        """The documents.

        Raises:
            DataError: no data folder, or none of these files in it.
        """
        if data is None:
            raise DataError(f"perplexity needs a data folder with {self.wanted}")
        for folder in self.folders:
            if files := sorted((Path(data) / folder).glob(self.pattern)):
                return files
        raise DataError(f"data folder {str(data)!r} lacks {self.wanted}")


class PerplexityTask(Task):
    """Mean negative log-likelihood of the target, in nats. `details` of a sample: `document`, the file's name;
    `start`, the window's first token in it; `target_tokens`."""

    suite = "perplexity"
    metric = "nll"
    higher_is_better = False

    def __init__(self, name: str, source: Source, target_tokens: int = 256) -> None:
        if target_tokens < 1:
            raise InputError(f"target_tokens={target_tokens}; it has to be at least 1")
        self.name, self.source, self.target_tokens = name, source, target_tokens
        self.minimum_length = 2 * target_tokens

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
        opening = opening_tokens(tokenizer)
        if length < self.target_tokens + len(opening) + 2:
            raise InputError(
                f"length={length} of {self.name} has to hold {self.target_tokens} target tokens and a context; give at "
                f"least {self.minimum_length}"
            )
        found: list[Sample] = []
        for file, start, ids in _windows(self.source.files(data), tokenizer, length - len(opening), seed):
            if len(found) == n:
                break
            found.append(self._sample(tokenizer, len(found), file.name, start, opening, ids))
        if not found:
            raise DataError(f"no document of {str(data)!r} has the {length} tokens of a sample; lower the length")
        return found

    def _sample(
        self, tokenizer: Any, index: int, document: str, start: int, opening: tuple[int, ...], ids: tuple[int, ...]
    ) -> Sample:
        cut = len(ids) - self.target_tokens
        context, bridge = ids[: cut - 1], ids[cut - 1 : cut]
        return Sample(
            suite=self.suite,
            task=self.name,
            index=index,
            prompt=Prompt(tokenizer.decode(context), tokenizer.decode(bridge), opening + context, bridge, opening),
            answers=(),
            max_new_tokens=0,
            target_ids=ids[cut:],
            details={"document": document, "start": start, "target_tokens": self.target_tokens},
        )

    def score(self, prediction: str, sample: Sample) -> float:
        """Raises UnsupportedFeatureError: a likelihood is no property of a text."""
        raise UnsupportedFeatureError(f"{self.name} is scored by the likelihood of its target tokens, not by a text")


def _windows(files: list[Path], tokenizer: Any, tokens: int, seed: int) -> Iterator[tuple[Path, int, tuple[int, ...]]]:
    """Windows of ``tokens`` tokens, a round of the documents after another: (document, first token, ids)."""
    rng = random.Random(f"perplexity/{seed}")
    files = rng.sample(files, len(files))
    documents: dict[Path, tuple[tuple[int, ...], list[int]]] = {}
    turn = 0
    while files:
        for file in list(files):
            if file not in documents:
                ids = tokens_of(tokenizer, _text(file), False)
                count = len(ids) // tokens
                offset = random.Random(f"{file.name}/{seed}").randrange(max(1, len(ids) - count * tokens + 1))
                order = random.Random(f"{file.name}/{seed}/order").sample(range(count), count)
                documents[file] = ids, [offset + place * tokens for place in order]
            ids, starts = documents[file]
            if turn < len(starts):
                yield file, starts[turn], ids[starts[turn] : starts[turn] + tokens]
            else:
                files.remove(file)
                del documents[file]
        turn += 1


def _text(file: Path) -> str:
    """A document's text; of a JSON-lines file, its `text` fields joined as they stand.

    Raises:
        DataError: not UTF-8, not JSON lines, or lines without `text`.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".jsonl":
            return text
        return "".join(json.loads(line)["text"] or "\n" for line in text.split("\n") if line)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not readable as UTF-8 text or JSON lines with `text`: {error!r}") from error


def opening_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before any text, as a BOS."""
    bare, whole = tokens_of(tokenizer, "a", False), tokens_of(tokenizer, "a", True)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return ()


_BOOKS = Source(("text/books", "books", "."), "*.txt", BOOKS)
TASKS = {
    "books": PerplexityTask("books", _BOOKS),
    "books_long": PerplexityTask("books_long", _BOOKS, 4096),
    "wikitext": PerplexityTask("wikitext", Source(("text/wiki", "wiki", "."), "wikitext*.jsonl", WIKITEXT)),
}

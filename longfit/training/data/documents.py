"""Documents: read from text files or JSON lines, split by their hash, tokenised when they are first used."""

import functools
import glob
import hashlib
import json
import random
import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from longfit.errors import DataError, InputError
from longfit.training.data.episode import EVAL, TRAIN

PIECE_CHARACTERS = 20_000
EVAL_PERCENT = 5
BYTES_PER_TOKEN = 4
ROUNDED = 64
TRIES = 200
# wikitext marks an article's title with one equals sign on each side, its sections with more.
_WIKITEXT_TITLE = re.compile(r" = [^=].*[^=] = \n")


@dataclass(frozen=True)
class Document:
    """A text and where it is from.

    Attributes:
        whole: SHA-256 of the document that this is a piece of; empty where it is not cut.
    """

    name: str
    text: str
    whole: str = ""

    @functools.cached_property
    def sha256(self) -> str:
        """Of the text, whatever its case and white space."""
        return hashlib.sha256(" ".join(self.text.lower().split()).encode()).hexdigest()

    @property
    def unit(self) -> str:
        """Hash of what is split between training and evaluation: of the whole document, for each of its pieces."""
        return self.whole or self.sha256


def split_of(document: Document) -> str:
    """ "eval" for about one document in twenty, by its hash: the same one is never in both, nor are its pieces."""
    return EVAL if int(document.unit[:8], 16) % 100 < EVAL_PERCENT else TRAIN


def split(documents: list[Document]) -> dict[str, list[Document]]:
    """Documents by split, each with all of its pieces.

    Where so few are given that the hash leaves a split empty, the document with the smallest hash is held back alone.
    One document is not split: it is all for training, and the evaluation has none.
    """
    units = {document.unit for document in documents}
    held = {document.unit for document in documents if split_of(document) == EVAL}
    if not held or held == units:
        held = {min(units)} if len(units) > 1 else set()
    return {
        TRAIN: [document for document in documents if document.unit not in held],
        EVAL: [document for document in documents if document.unit in held],
    }


def hashes_of(documents: Iterable[Document]) -> set[str]:
    """Of the documents, and of those that they are pieces of."""
    return {found for document in documents for found in (document.sha256, document.unit)}


def read_documents(pattern: str, data: str | Path | None) -> list[Document]:
    """The documents of text files (*.txt, *.md) and JSON lines with `text` (*.jsonl), each once.

    A long text is cut into pieces of about 20,000 characters at the end of a paragraph, which know what they are pieces
    of; wikitext, whose lines are paragraphs, becomes its articles.

    Args:
        pattern: a file, a folder or a glob pattern, below the data folder or by itself.
        data: the data folder.

    Raises:
        DataError: nothing matches, a file is broken, or there is no text in any.
    """
    files = matching(pattern, data)
    found = [piece for file in files for document in _read(file) for piece in _pieces(document)]
    unique = {document.sha256: document for document in found if document.text.strip()}
    if not unique:
        raise DataError(f"{pattern!r} is empty: {len(files)} files without any text")
    return list(unique.values())


def matching(pattern: str, data: str | Path | None) -> list[Path]:
    """Files of a pattern, sorted.

    Raises:
        DataError: there are none.
    """
    places = [Path(data) / pattern] if data is not None else []
    for place in [*places, Path(pattern)]:
        if place.is_dir():
            found = [file for file in place.rglob("*") if file.suffix in (".txt", ".md", ".jsonl")]
        else:
            found = [Path(file) for file in glob.glob(str(place), recursive=True) if Path(file).is_file()]
        if found:
            return sorted(found)
    where = f"data folder {str(data)!r}" if data is not None else "the working directory (no data folder was given)"
    raise DataError(f"no file matches {pattern!r} in {where}; give a folder, a file or a pattern of .txt or .jsonl")


def _read(file: Path) -> list[Document]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".jsonl":
            return [Document(file.name, text)]
        rows = [str(json.loads(line)["text"]) for line in text.split("\n") if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not readable as UTF-8 text or JSON lines with `text`: {error!r}") from error
    titles = [number for number, row in enumerate(rows) if _WIKITEXT_TITLE.fullmatch(row)]
    if not titles:
        return [Document(f"{file.name}:{number}", row) for number, row in enumerate(rows, 1)]
    spans = zip(titles, [*titles[1:], len(rows)], strict=True)
    return [Document(f"{file.name}:{start + 1}", "".join(rows[start:stop])) for start, stop in spans]


def _pieces(document: Document) -> list[Document]:
    text, pieces, start = document.text, [], 0
    if len(text) <= 2 * PIECE_CHARACTERS:
        return [document]
    while start < len(text):
        end = text.find("\n", start + PIECE_CHARACTERS)
        stop = len(text) if end < 0 or len(text) - end < PIECE_CHARACTERS // 2 else end + 1
        pieces.append(Document(f"{document.name}@{start}", text[start:stop], document.sha256))
        start = stop
    return pieces


class Pool:
    """Tokenised documents of one split, drawn from by length.

    Args:
        documents: what there is.
        tokenizer: of the model.
        long_factor, long_tokens: documents of at least `long_tokens` tokens are drawn `long_factor` times as often as
            their length alone says (length upsampling within a domain, which leaves the mixture of domains as it is:
            Fu et al. 2024, "Data Engineering for Scaling Language Models to 128K Context").
    """

    def __init__(
        self, documents: list[Document], tokenizer: Any, long_factor: float = 1.0, long_tokens: int = 4096
    ) -> None:
        self.documents, self.tokenizer = documents, tokenizer
        self.long_factor, self.long_tokens = long_factor, long_tokens
        # A text has at most one token a byte.
        self._bytes = [len(document.text.encode()) for document in documents]
        self._ids: dict[int, list[int]] = {}
        self._chances: dict[int, tuple[list[int], list[float]]] = {}

    def window(self, rng: random.Random, tokens: int) -> tuple[list[int], Document]:
        """`tokens` consecutive tokens of one document, and the document; what is drawn depends on `rng` alone.

        Raises:
            DataError: no document is that long.
        """
        fitting, chances = self._at_least(tokens // ROUNDED * ROUNDED)
        for _ in range(TRIES if fitting else 0):
            number = fitting[bisect_right(chances, rng.random() * chances[-1])]
            if len(self.ids(number)) >= tokens:
                return self._cut(rng, number, tokens)
        if fitting := [number for number in fitting if len(self.ids(number)) >= tokens]:
            return self._cut(rng, rng.choice(fitting), tokens)
        raise DataError(
            f"none of the {len(self.documents)} documents has {tokens} tokens; give longer ones or lower "
            "context_tokens and target_tokens"
        )

    def _cut(self, rng: random.Random, number: int, tokens: int) -> tuple[list[int], Document]:
        ids = self.ids(number)
        start = rng.randrange(len(ids) - tokens + 1)
        return ids[start : start + tokens], self.documents[number]

    def ids(self, number: int) -> list[int]:
        """[n] tokens of a document."""
        if number not in self._ids:
            self._ids[number] = tokens_of(self.tokenizer, self.documents[number].text)
        return self._ids[number]

    def _at_least(self, size: int) -> tuple[list[int], list[float]]:
        """Numbers of the documents with that many bytes, and their chances, summed up."""
        if size not in self._chances:
            numbers = [number for number, length in enumerate(self._bytes) if length >= max(1, size)]
            lengths = [self._bytes[number] / BYTES_PER_TOKEN for number in numbers]
            chances = [length * (self.long_factor if length >= self.long_tokens else 1.0) for length in lengths]
            self._chances[size] = numbers, list(accumulate(chances))
        return self._chances[size]


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without anything added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def pools(given: dict[str, Any], tokenizer: Any, data: str | Path | None) -> dict[str, Pool]:
    """The training and the evaluation documents of a source.

    Args:
        given: `files` (a pattern), split by hash unless `eval_files` names the others; `long_factor`, `long_tokens`.

    Raises:
        DataError: no such files, or a single document and no `eval_files`.
        InputError: `files` is missing.
    """
    if "files" not in given:
        raise InputError("a text source needs `files`, a folder or pattern below the data folder, or `dataset`")
    documents = read_documents(given["files"], data)
    if other := given.get("eval_files"):
        found = {TRAIN: documents, EVAL: read_documents(other, data)}
    else:
        found = split(documents)
    if not found[EVAL]:
        raise DataError(
            f"{given['files']!r} is a single document, and a document is never split between training and evaluation: "
            "name others as eval_files, or give more than one file or row in files"
        )
    options = {key: given[key] for key in ("long_factor", "long_tokens") if key in given}
    return {name: Pool(of_split, tokenizer, **options) for name, of_split in found.items()}

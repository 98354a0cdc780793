"""A dataset of the Hugging Face hub, or any iterable of texts, streamed: a buffer of documents that moves by step."""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from longfit.errors import DataError, InputError
from longfit.training.data.documents import Document, Pool, hashes_of, split_of
from longfit.training.data.episode import EVAL, TEXT, TRAIN, Builder, Episode


class Streamed:
    """Continuation of documents that are never all in memory.

    At step s the buffer holds the training documents among rows s * `per_step` to s * `per_step` + `buffer` of the
    stream, so where it stands follows from the step alone, and a resumed run draws what it would have drawn. A stream
    that ends starts again. The first `eval_documents` that hash to the evaluation split are kept for it. None that
    hashes to it is trained on, nor any that a source of the mixture evaluates (`leave_out`); as rows they stay in the
    buffer, so that they do not move where the stream stands.

    Args:
        open_stream: gives an iterator over the texts, from the start, of the documents after a number of them.
        per_step: rows by which the buffer moves at each step.
    """

    kind = "text"

    def __init__(
        self,
        open_stream: Callable[[int], Iterator[str]],
        tokenizer: Any,
        buffer: int = 256,
        per_step: int = 4,
        eval_documents: int = 64,
        name: str = "stream",
    ) -> None:
        self.open_stream, self.tokenizer, self.name = open_stream, tokenizer, name
        self.buffer, self.per_step = buffer, per_step
        first = itertools.islice(self._documents(0), eval_documents * 40)
        self.held = Pool(list(itertools.islice((d for d in first if split_of(d) == EVAL), eval_documents)), tokenizer)
        if not self.held.documents:
            raise DataError(f"the dataset {name} is empty, or too small to hold documents back for evaluation")
        self._left_out: frozenset[str] = frozenset()
        self._rows: Iterator[Document] | None = None
        self._buffer: list[Document] = []
        self._at, self._pool = -1, Pool([], tokenizer)

    def _documents(self, skip: int) -> Iterator[Document]:
        """Every row from number `skip` on, once."""
        for number, text in enumerate(self.open_stream(skip), skip):
            yield Document(f"{self.name}:{number}", text or "")

    def leave_out(self, hashes: Iterable[str]) -> None:
        """From now on no document with one of these hashes is trained on; call it before the first episode."""
        self._left_out = frozenset(hashes)

    def at(self, step: int) -> Pool:
        """The training documents in the buffer at a step.

        Raises:
            DataError: there are none.
        """
        if step == self._at:
            return self._pool
        move = (step - self._at) * self.per_step
        if self._rows is None or step < self._at or move > self.buffer:
            self._rows, self._buffer = self._endless(step * self.per_step), []
        else:
            self._buffer = self._buffer[move:]
        self._buffer += itertools.islice(self._rows, self.buffer - len(self._buffer))
        training = [d for d in self._buffer if self._trains(d)]
        self._at, self._pool = step, Pool(training, self.tokenizer)
        if not training:
            raise DataError(
                f"at step {step} every row in the buffer of the dataset {self.name} is empty or held back for "
                f"evaluation; raise buffer={self.buffer}, or lower per_step={self.per_step}"
            )
        return self._pool

    def _trains(self, document: Document) -> bool:
        return bool(document.text.strip()) and split_of(document) == TRAIN and document.sha256 not in self._left_out

    def _endless(self, skip: int) -> Iterator[Document]:
        """Rows from number `skip` on, round and round."""
        rows = self._documents(skip)
        first = next(rows, None)
        if first is None:
            # Past the end: where that is, only a pass through all of it can tell.
            count = sum(1 for _ in self._documents(0))
            rows = self._documents(skip % count)
            first = next(rows)
        yield first
        yield from rows
        while True:
            yield from self._documents(0)

    def episode(self, rng: random.Random, context_tokens: int, target_tokens: int, split: str, step: int) -> Episode:
        pool = self.held if split == EVAL else self.at(step)
        ids, document = pool.window(rng, context_tokens + target_tokens)
        return Builder().add(ids[context_tokens:], TEXT).episode(ids[:context_tokens], self.kind, document.name)

    def hashes(self, split: str) -> set[str]:
        """Of what is evaluated. What is trained on is not known before it is streamed: see `leave_out`."""
        return hashes_of(self.held.documents) if split == EVAL else set()


def hub_stream(given: dict[str, Any]) -> Callable[[int], Iterator[str]]:
    """Opens a dataset of the hub, or of a local folder, for streaming.

    Args:
        given: `dataset` (its id or path), and where they differ from the usual `config`, `split` ("train"), `column`
            ("text") and `revision`.

    Raises:
        InputError: the datasets library is not installed.
        DataError: the dataset cannot be opened, or has no such column.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError("`dataset` needs the datasets library: pip install datasets") from error
    column = given.get("column", "text")

    def open_stream(skip: int) -> Iterator[str]:
        try:
            stream = datasets.load_dataset(
                given["dataset"],
                given.get("config"),
                split=given.get("split", "train"),
                revision=given.get("revision"),
                streaming=True,
            )
            for row in stream.skip(skip):
                yield row[column]
        except KeyError as error:
            raise DataError(f"the dataset {given['dataset']!r} has no column {column!r}") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"the dataset {given['dataset']!r} cannot be read: {error}") from error

    return open_stream

"""What the worker does with the model: read a document into a memory, answer a question."""

import dataclasses
import logging
import time
from typing import Any

from longfit.compressors import KeepAll
from longfit.docqa.asking import check_tokenizer, compress, kept_of, source_of
from longfit.docqa.citations import cite
from longfit.docqa.kept_picture import picture
from longfit.docqa.prompt import context_of
from longfit.docqa.server.asked import Answered, Asked, Cancelled
from longfit.docqa.server.conversation import after_document_ids, conversation_ids, question_of
from longfit.docqa.server.errors import ApiError, api_error, is_full_disk
from longfit.docqa.server.generating import generate
from longfit.docqa.server.library import Library
from longfit.docqa.server.record import COMPRESSING, QUEUED, READY, Record
from longfit.docqa.server.worker import Job
from longfit.errors import FingerprintError, LongfitError, MemoryFileError
from longfit.families import window_of
from longfit.memory import Memory

logger = logging.getLogger("longfit.serve")


class Engine:
    """A wrapped model and its library. Every method is called in the worker's thread."""

    def __init__(self, model: Any, tokenizer: Any, library: Library) -> None:
        self.model, self.tokenizer, self.library = model, tokenizer, library
        self.context = model.longfit

    @property
    def about(self) -> dict[str, str]:
        """What compresses here."""
        context = self.context
        parts = (
            context.prompt,
            context.encoder,
            None if isinstance(context.method, KeepAll) else context.method,
            context.patch,
        )
        method = " and ".join(part.name for part in parts if part is not None)
        return {"method": method, "budget": "none" if context.free else str(context.budget)}

    # -- documents ------------------------------------------------------------------------------------------------

    def read(self, job: Job, record: Record) -> None:
        """Compress a document; what goes wrong is told in its record."""
        try:
            self.compress(job, record)
        except Cancelled:
            record.status = QUEUED
        except Exception as error:
            if record.id not in self.library:
                record.clear()  # what was written after it was removed
            else:
                known = isinstance(error, LongfitError | ApiError) or is_full_disk(error)
                logger.warning("%s cannot be compressed: %s", record.id, error, exc_info=None if known else error)
                self.library.fail(record, api_error(error))

    def compress(self, job: Job, record: Record) -> Memory:
        """Read a document into a memory, on disk and in RAM.

        Raises:
            Cancelled: the job was cancelled, or the document removed meanwhile.
            ApiError: 404, the document was removed; 413, it does not fit the memory limit.
            LongfitError: it cannot be compressed.
            OSError, SafetensorError: the memory cannot be written.
        """
        self.library.record(record.id)
        documents = record.documents()
        tokens = len(context_of(self.tokenizer, documents)[0])
        plan = self.context.plan(1, tokens)
        expected = {
            "tokens_in": tokens,
            "kept_tokens": plan.kept_tokens,
            "kv_bytes": plan.kv_kept_bytes,
            "full_kv_bytes": self.context.shape.full_kv_bytes(tokens),
        }
        record.facts, record.status = expected, COMPRESSING
        started = time.perf_counter()

        def told(read: int, total: int) -> None:
            job.check()
            if record.id not in self.library:
                raise Cancelled
            record.facts = {**(record.facts or {}), "tokens_done": read}

        room = self.library.reserve(max(plan.prefill_peak_bytes, 2 * plan.kv_kept_bytes))
        with room, self.context.observed(told):
            memory = compress(self.model, self.tokenizer, documents)
            facts = expected | {
                "tokens_in": memory.tokens_in,
                "kept_tokens": round(memory.kept_tokens, 1),
                "kv_bytes": memory.kv_bytes,
                "seconds": round(time.perf_counter() - started, 2),
            }
            self._save(record, memory, facts)
        self.library.keep(record, memory)
        self.library.ready(record, facts)
        return memory

    def _save(self, record: Record, memory: Memory, facts: dict[str, Any]) -> None:
        """Write the picture of what was kept, and then the memory, which makes the document ready."""
        source = source_of(memory)
        if (held := kept_of(memory.cache, source)) is not None:
            file = record.picture_file(self.library.fingerprint)
            file.write_text(picture(held, source.documents), encoding="utf-8")
        about = {"document": ", ".join(record.names), "served": facts}
        memory.save(record.memory_folder(self.library.fingerprint), about)

    # -- answers --------------------------------------------------------------------------------------------------

    def answer(self, job: Job, asked: Asked) -> Answered:
        """Answer, sending the text piece by piece.

        Raises:
            ApiError: 404, no such document; 409, one that could not be compressed; 413, more than the memory limit.
            LongfitError: a chat or a question that cannot be answered.
        """
        if asked.document is None:
            return self._alone(job, asked)
        record = self.library.record(asked.document)
        memory = self._memory(job, record)
        source = source_of(memory)
        ids = after_document_ids(self.tokenizer, asked.messages, source.text)
        new = self._check_fits(memory, len(ids), asked.max_tokens)
        entry = memory.kv_bytes / max(1.0, memory.kept_tokens)
        with self.library.reserve(int(memory.kv_bytes + entry * (len(ids) + new)), record.id):
            answered = generate(self.model, self.tokenizer, job, asked, ids, new, memory)
        if not answered.text.strip() or not asked.citations:
            return answered
        job.emit("citing", None)
        found = cite(
            self.model,
            self.tokenizer,
            source.documents,
            question_of(asked.messages),
            answered.text.strip(),
            n=asked.citations,
            kept=kept_of(memory.cache, source),
            before_each=job.check,
        )
        return dataclasses.replace(answered, citations=tuple(found))

    def _memory(self, job: Job, record: Record) -> Memory:
        """A document's memory; one that is damaged, or another tokenizer's, is made again from the text."""
        if record.error is not None:
            raise ApiError(409, f"this document could not be compressed: {record.error['message']}", "document_failed")
        if record.status == READY:
            try:
                found = self.library.memory(record, self.model)
                check_tokenizer(found, self.tokenizer)
                return found
            except (MemoryFileError, FingerprintError) as error:
                logger.warning("the memory of %s is made again: %s", record.id, error)
        return self.compress(job, record)

    def _alone(self, job: Job, asked: Asked) -> Answered:
        """A chat without a document is the plain model's, nothing compressed, as long as that fits."""
        ids = conversation_ids(self.tokenizer, asked.messages)
        window = window_of(self.context.config)
        if len(ids) + asked.max_tokens > window:
            raise ApiError(
                400,
                f"the chat has {len(ids):,} tokens and the answer may have {asked.max_tokens:,}; without a document "
                f"they have to fit the model's {window:,}: upload the long text to /v1/documents and ask about that",
                "context_length_exceeded",
                "messages",
            )
        with (
            self.library.reserve(self.context.shape.full_kv_bytes(len(ids) + asked.max_tokens)),
            self.model.disabled(),
        ):
            return generate(self.model, self.tokenizer, job, asked, ids, asked.max_tokens, None)

    def _check_fits(self, memory: Memory, question: int, new: int) -> int:
        """Tokens that the answer may have.

        Raises:
            ApiError: 400, the question alone would fill the budget, or pass the model's window.
        """
        cache = memory.cache
        limit = cache.ledger.kept_limit(memory.tokens_in + question)
        if question >= limit:
            raise ApiError(
                400,
                f"the question has {question:,} tokens, and the budget holds {limit:,} a layer, the document's "
                "included: ask a shorter question, or start the server with a larger --budget",
                "question_too_long",
                "messages",
            )
        if cache.ledger.packed:
            return new
        left = window_of(self.context.config) - cache.seen - question
        if left < 1:
            raise ApiError(
                400,
                f"the document and the question have {cache.seen + question:,} tokens, more than the model's window, "
                "and this memory keeps the document's positions: ask a shorter question",
                "context_length_exceeded",
                "messages",
            )
        return min(new, left)

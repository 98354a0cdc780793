"""Prefill in chunks and decode, inside a budget: what a wrapped model's forward does."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from longfit.cache import FitCache, recall, trim_together
from longfit.calls import take_tokens
from longfit.chunks import chunk_spans, one_by_one
from longfit.compressors import Encoded, LearnedCompressor, PromptCompressor
from longfit.errors import UnsupportedFeatureError
from longfit.filling import compress_context, place_encoded
from longfit.padding import mask_of, padding_of
from longfit.shortening import shorten


@dataclass
class Stream:
    """One forward of a wrapped model over new tokens: chunk by chunk, trimming layer by layer.

    Attributes:
        model: the wrapped model.
        base_forward: its class's own forward.
        decoder: its stack of layers, which runs the chunks whose logits nobody asked for.
        cache: the cache to fill.
        encoder: the learned compressor that the context goes through first; None for none.
        prompt: the prompt compressor that the input goes through before anything else; None for none.
        free: the encoder compresses at its own ratio, whatever the length: there is no budget.
    """

    model: Any
    base_forward: Any
    decoder: nn.Module
    cache: FitCache
    encoder: LearnedCompressor | None = None
    free: bool = False
    prompt: PromptCompressor | None = None

    def run(self, arguments: dict[str, Any]) -> CausalLMOutputWithPast:
        """Take the forward's arguments, give its output; `logits` cover what `logits_to_keep` asks for."""
        tokens, name = take_tokens(arguments)
        keep = arguments.pop("logits_to_keep", 0)
        labels = arguments.pop("labels", None)
        started = time.perf_counter()
        pieces = self._pieces(
            tokens, arguments, name, want_all=labels is not None or not _is_one(keep), labelled=labels is not None
        )
        outputs: Any = None
        logits: list[Tensor] = []
        for ran, given in pieces:
            outputs = ran
            if given is not None:
                logits.append(given)
        outputs.logits = torch.cat(logits, 1) if len(logits) > 1 else logits[0]
        if labels is not None:
            outputs.loss = self.model.loss_function(
                logits=outputs.logits,
                labels=labels,
                vocab_size=self.model.config.get_text_config().vocab_size,
            )
        if isinstance(keep, Tensor):
            outputs.logits = outputs.logits[:, keep]
        elif keep:
            outputs.logits = outputs.logits[:, -keep:]
        self._clock(tokens.shape[1], time.perf_counter() - started)
        return outputs

    def fill(self, arguments: dict[str, Any], aside: int = 0) -> None:
        """Read tokens into the cache without computing a logit.

        The last `aside` of them are a question that may be looked at and is not stored.
        """
        tokens, name = take_tokens(arguments)
        started = time.perf_counter()
        for _ in self._pieces(tokens, arguments, name, want_all=False, want_last=False, aside=aside):
            pass
        self._clock(tokens.shape[1], time.perf_counter() - started)

    def fill_padded(self, ids: Tensor, padding: list[int]) -> None:
        """Read ids [B, T], left-padded by `padding` columns, into the cache as they are."""
        self.fill({"input_ids": ids, "attention_mask": mask_of(padding, ids.shape[1], ids.device)})

    def _clock(self, tokens: int, seconds: float) -> None:
        if self.cache.step.phase == "decode":
            self.cache.decode_seconds += seconds
            self.cache.new_tokens += tokens
        else:
            self.cache.prefill_seconds += seconds

    def _pieces(
        self,
        tokens: Tensor,
        arguments: dict[str, Any],
        name: str,
        want_all: bool,
        want_last: bool = True,
        aside: int = 0,
        labelled: bool = False,
    ):
        """Run every chunk; yields (outputs, logits or None) of each."""
        cache = self.cache
        mask = arguments.pop("attention_mask", None)
        padding = padding_of(mask, tokens, cache.get_seq_length(), cache.ledger.padding)
        arguments.pop("position_ids", None)
        first_call, given = cache.seen == 0, tokens.shape[1]
        asks = want_all or want_last
        phase = "decode" if tokens.shape[1] == 1 and not first_call and asks else "prefill"
        if first_call:
            tokens, padding = self._prepared(tokens, padding, want_last, aside, labelled)
        if aside and not cache.method.query_aware:  # the encoder has looked at it
            tokens, aside = tokens[:, :-aside], 0
        T = tokens.shape[1]
        if T == 0 and not asks:  # all of it became slots
            cache.question_tokens = 0
            return
        total = cache.seen + T - aside
        question = cache.question_tokens if phase == "prefill" and cache.method.query_aware else 0
        cache.question_tokens = 0
        spans = chunk_spans(T - question, cache.chunk_tokens)
        if asks:
            spans = one_by_one(spans, cache.asking_tokens(total, cache.ledger.padding or padding or [0]))
        replay = cache.method.replays and phase == "prefill" and (first_call or not asks or len(spans) > 1)
        tail = tokens[:, T - question :]
        for index, (start, stop) in enumerate(spans):
            last = index == len(spans) - 1
            part = torch.cat([tokens[:, start:stop], tail], 1) if question else tokens[:, start:stop]
            again: list[list[int]] = []
            if cache.releases and cache.seen and stop - start == 1:
                again, ids = recall(cache)
                part = torch.cat([ids.to(part), part], 1)
            positions = cache.begin(
                part.shape[1],
                padding,
                tokens.shape[0],
                phase=phase,
                total_tokens=total,
                probe_tokens=0 if last and not aside else question,
                question_tokens=question,
                hold=cache.method.replays and phase == "prefill",
                ids=part if name == "input_ids" else None,
                again=again,
            )
            call = self._call(part, name, positions, arguments)
            logits = None
            with nullcontext() if self.encoder is None else self.encoder.reading(cache.encoded):
                if want_all or (last and want_last):
                    outputs = self.base_forward(**call, logits_to_keep=0 if want_all else 1)
                    stored = part.shape[1] if last else stop - start
                    logits = outputs.logits[:, cache.step.again_columns if want_all else 0 :][:, :stored]
                else:
                    outputs = self.decoder(**call)
            cache.end()
            if replay:
                self._replay(tokens[:, start:stop], arguments, name)
            if cache.step.hold or replay:
                trim_together(cache)
            cache.chunks += phase == "prefill" and not cache.step.again_columns
            if phase == "prefill":
                self._tell(given - T + stop, given)
            yield outputs, logits

    def _tell(self, read: int, total: int) -> None:
        if self.model.longfit.observer is not None:
            self.model.longfit.observer(read, total)

    def _prepared(
        self, tokens: Tensor, padding: list[int] | None, answers: bool, aside: int, labelled: bool
    ) -> tuple[Tensor, list[int] | None]:
        """What the compressors of the input leave to be read by an empty cache, [B, T], and its padding."""
        cache = self.cache
        if self.prompt is not None and cache.shortened is None:
            learned = self.encoder is not None
            tokens, padding = shorten(self.prompt, cache, tokens, padding, answers, learned, aside)
            if labelled and cache.shortened is not None:
                raise UnsupportedFeatureError(
                    f"labels go with every token, and {self.prompt.name} leaves tokens out; use `model.disabled()`"
                )
        if self.encoder is not None:
            before = padding or [0] * tokens.shape[0]
            tokens = compress_context(
                self.encoder,
                cache,
                tokens,
                before,
                free=self.free,
                answers=answers,
                tell=self._tell,
                read_slots=self._read_slots,
            )
        return tokens, padding

    def read_again(self, encoded: Encoded, ids: Tensor) -> None:
        """Read soft slots and the ids [B, T] after them into an empty cache, as they were read at first."""
        assert self.encoder is not None
        rows = slice(0, encoded.rows)
        padding = [0] * encoded.rows
        place_encoded(self.encoder, self.cache, [(rows, encoded)], padding, encoded.tokens_in, self._read_slots)
        self.cache.raw_ids = ids
        if ids.shape[1]:
            self.fill({"input_ids": ids})

    def _read_slots(self, slots: Tensor, padding: list[int]) -> None:
        """Read embeddings [B, M, E], left-padded, into the empty cache as tokens."""
        assert self.encoder is not None
        M = slots.shape[1]
        with self.encoder.reading(None):
            for start, stop in chunk_spans(M, self.cache.chunk_tokens):
                part = slots[:, start:stop].to(self.model.dtype)
                positions = self.cache.begin(stop - start, padding, slots.shape[0], phase="prefill", total_tokens=M)
                self.decoder(**self._call(part, "inputs_embeds", positions, {}))
                self.cache.end()

    def _replay(self, chunk: Tensor, arguments: dict[str, Any], name: str) -> None:
        """Make the model repeat the chunk that was just stored."""
        cache = self.cache
        B, C = chunk.shape[:2]
        prompt = torch.tensor(cache.method.repeat_ids, dtype=torch.long, device=chunk.device).expand(B, -1)
        if name == "inputs_embeds":
            prompt = self.model.get_input_embeddings()(prompt)
        padding = list(cache.step.padding)
        rows = [torch.cat([q, c[p:], c[:p]]) for c, q, p in zip(chunk, prompt, padding, strict=True)]
        repeated = torch.stack(rows)
        n = repeated.shape[1]
        total = cache.step.total_tokens
        positions = cache.begin(
            n,
            None,
            B,
            phase="prefill",
            total_tokens=total,
            probe_tokens=n,
            replayed_tokens=C,
            trailing=padding,
            ids=repeated if name == "input_ids" else None,
        )
        self.decoder(**self._call(repeated, name, positions, arguments))

    def _call(self, part: Tensor, name: str, positions: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
        """What a forward of `part`, the argument `name`, at rotary `positions` [B, columns] takes."""
        padding = self.cache.ledger.blank or self.cache.ledger.padding
        return {
            **arguments,
            name: part,
            "position_ids": positions.to(part.device),
            "attention_mask": mask_of(padding, self.cache.seen + part.shape[1], part.device),
            "past_key_values": self.cache,
            "use_cache": True,
        }


def _is_one(keep: Any) -> bool:
    return isinstance(keep, int) and keep == 1

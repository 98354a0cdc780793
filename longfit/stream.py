"""Prefill in chunks and decode, inside a budget: what a wrapped model's forward does."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from longfit.cache import FitCache
from longfit.compressors import Encoded, KeepAll, LearnedCompressor, PromptCompressor
from longfit.errors import InputError, UnsupportedFeatureError
from longfit.filling import fill, place_encoded, share
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
        tokens, name = _tokens(arguments)
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
        tokens, name = _tokens(arguments)
        started = time.perf_counter()
        for _ in self._pieces(tokens, arguments, name, want_all=False, want_last=False, aside=aside):
            pass
        self._clock(tokens.shape[1], time.perf_counter() - started)

    def fill_padded(self, ids: Tensor, padding: list[int]) -> None:
        """Read ids [B, T], left-padded by `padding` columns, into the cache as they are."""
        columns = torch.arange(ids.shape[1], device=ids.device)
        mask = (columns[None] >= torch.tensor(padding, device=ids.device)[:, None]).long()
        self.fill({"input_ids": ids, "attention_mask": mask if any(padding) else None})

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
        padding = self._padding(arguments.pop("attention_mask", None), tokens)
        arguments.pop("position_ids", None)
        first_call, given = cache.seen == 0, tokens.shape[1]
        asks = want_all or want_last
        phase = "decode" if tokens.shape[1] == 1 and not first_call and asks else "prefill"
        if self.prompt is not None and first_call and cache.shortened is None:
            tokens, padding = self._shorten(self.prompt, tokens, padding, name, want_last, aside)
            if labelled and cache.shortened is not None:
                raise UnsupportedFeatureError(
                    f"labels go with every token, and {self.prompt.name} leaves tokens out; use `model.disabled()`"
                )
        if self.encoder is not None and first_call:
            tokens = self._compress(self.encoder, tokens, padding or [0] * tokens.shape[0], name)
        if aside and not cache.method.query_aware:  # the encoder has looked at it
            tokens, aside = tokens[:, :-aside], 0
        T = tokens.shape[1]
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
                again, ids = cache.recall()
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
            call = {**arguments, name: part, "position_ids": positions.to(part.device)}
            logits = None
            with nullcontext() if self.encoder is None else self.encoder.reading(cache.encoded):
                if want_all or (last and want_last):
                    outputs = self.base_forward(**self._with_cache(call, part), logits_to_keep=0 if want_all else 1)
                    stored = part.shape[1] if last else stop - start
                    logits = outputs.logits[:, cache.step.again_columns if want_all else 0 :][:, :stored]
                else:
                    outputs = self.decoder(**self._with_cache(call, part))
            cache.end()
            if replay:
                self._replay(tokens[:, start:stop], arguments, name)
            if cache.step.hold or replay:
                cache.trim_together()
            cache.chunks += phase == "prefill" and not cache.step.again_columns
            if phase == "prefill":
                self._tell(given - T + stop, given)
            yield outputs, logits

    def _tell(self, read: int, total: int) -> None:
        if self.model.longfit.observer is not None:
            self.model.longfit.observer(read, total)

    def _shorten(
        self, prompt: PromptCompressor, tokens: Tensor, padding: list[int] | None, name: str, answers: bool, aside: int
    ) -> tuple[Tensor, list[int] | None]:
        """Let the prompt compressor leave out tokens; what is left, [B, T], and its padding.

        Where an answer follows (`answers`) and nobody said what is asked, the last tokens stay. The last `aside` are a
        question that is not stored.
        """
        cache = self.cache
        if name != "input_ids":
            raise UnsupportedFeatureError(f"{prompt.name} shortens token ids; inputs_embeds have none")
        tail = cache.question_tokens or (prompt.window_tokens if answers else 0)
        before = padding or [0] * tokens.shape[0]
        asked, learned = bool(cache.question_tokens), self.encoder is not None
        made = shorten(prompt, tokens, before, tail, asked, cache.allowance, learned, aside)
        if made is None:
            return tokens, padding
        cache.shortened = made.without_last(aside)
        if cache.ledger.keep_ratio is not None:  # a share of what was given, not of what is left of it
            share_left = min(n / max(1, len(kept)) for n, kept in zip(made.tokens, made.places, strict=True))
            cache.ledger.keep_ratio = min(1.0, cache.ledger.keep_ratio * share_left)
        return made.ids, made.own_padding

    def _compress(self, encoder: LearnedCompressor, tokens: Tensor, padding: list[int], name: str) -> Tensor:
        """Let the encoder make a memory of the context; returns what is left to be read, [B, T]."""
        cache, T = self.cache, tokens.shape[1]
        limit = None if self.free else cache.ledger.kept_limit(T - min(padding))
        trims = not isinstance(cache.method, KeepAll)
        made = share(encoder, T, cache.question_tokens, padding, limit, trims)
        if made is None:
            return tokens
        if name != "input_ids":
            raise UnsupportedFeatureError(f"{encoder.name} compresses token ids; inputs_embeds have none")
        asked = encoder.query_aware and cache.question_tokens
        question = tokens[:, T - cache.question_tokens :] if asked else None
        watched = encoder.watched(lambda read: self._tell(read, T))
        with watched, nullcontext() if question is None else encoder.asking(question):
            fill(encoder, cache, tokens[:, : made.context], padding, made.ratio, self._read_slots)
        if cache.encoded is not None and cache.encoded.soft is not None:
            cache.raw_ids = tokens[:, made.context : T - cache.question_tokens]
        return tokens[:, made.context :]

    def read_again(self, encoded: Encoded, ids: Tensor) -> None:
        """Read soft slots and the ids [B, T] after them into an empty cache, as they were read at first."""
        assert self.encoder is not None
        rows = slice(0, encoded.rows)
        padding = [0] * encoded.rows
        place_encoded(self.encoder, self.cache, [(rows, encoded)], padding, encoded.tokens_in, self._read_slots)
        self.cache.raw_ids = ids
        self.fill({"input_ids": ids})

    def _read_slots(self, slots: Tensor, padding: list[int]) -> None:
        """Read embeddings [B, M, E], left-padded, into the empty cache as tokens."""
        assert self.encoder is not None
        M = slots.shape[1]
        with self.encoder.reading(None):
            for start, stop in chunk_spans(M, self.cache.chunk_tokens):
                part = slots[:, start:stop].to(self.model.dtype)
                positions = self.cache.begin(stop - start, padding, slots.shape[0], phase="prefill", total_tokens=M)
                call = {"inputs_embeds": part, "position_ids": positions.to(part.device)}
                self.decoder(**self._with_cache(call, part))
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
        call = {**arguments, name: repeated, "position_ids": positions.to(chunk.device)}
        self.decoder(**self._with_cache(call, repeated))

    def _with_cache(self, call: dict[str, Any], part: Tensor) -> dict[str, Any]:
        mask = None
        padding = self.cache.ledger.blank or self.cache.ledger.padding
        if padding and any(padding):
            columns = torch.arange(self.cache.seen + part.shape[1], device=part.device)
            mask = (columns[None] >= torch.tensor(padding, device=part.device)[:, None]).long()
        return {**call, "attention_mask": mask, "past_key_values": self.cache, "use_cache": True}

    def _padding(self, mask: Tensor | None, tokens: Tensor) -> list[int] | None:
        """Left padding of each row, from the first forward's mask.

        Raises:
            InputError: padding on the right, holes, or a mask of the wrong shape.
            UnsupportedFeatureError: a mask that is not [B, tokens].
        """
        if mask is None:
            return None
        if mask.ndim != 2:
            raise UnsupportedFeatureError(
                f"attention_mask has {mask.ndim} dimensions; longfit takes a mask [B, tokens]"
            )
        so_far = self.cache.get_seq_length() + tokens.shape[1]
        if mask.shape[0] != tokens.shape[0] or mask.shape[1] not in (tokens.shape[1], so_far):
            raise InputError(
                f"attention_mask has shape {tuple(mask.shape)}; expected [{tokens.shape[0]}, {so_far}]: one entry for "
                "every token so far"
            )
        return left_padding(mask, known=self.cache.ledger.padding, new=tokens.shape[1])


def left_padding(mask: Tensor, known: list[int] | None = None, new: int = 0) -> list[int]:
    """Columns of left padding of each row of a mask [B, T].

    Raises:
        InputError: a row without a token, padding on the right or in between.
    """
    real = mask.bool()
    if known is not None:
        if not bool(real[:, -new:].all()):
            raise InputError("a further turn cannot bring padding; pad the first turn on the left instead")
        return known
    padding = (~real).long().cumprod(-1).sum(-1)
    if bool((padding == mask.shape[1]).any()):
        raise InputError("a row of the batch has no token: its attention_mask is all zeros")
    if bool((real.sum(-1) + padding != mask.shape[1]).any()):
        raise InputError(
            "padding has to be on the left for generation; set tokenizer.padding_side = 'left' "
            "(the mask has zeros after the first token of a row)"
        )
    return padding.tolist()


def chunk_spans(tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """Start and stop of each chunk. They are counted from the end, so that rows of a left-padded batch are cut where
    they would be cut alone; the first chunk takes the remainder."""
    stops = list(range(tokens, 0, -chunk_tokens))[::-1] or [0]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def one_by_one(spans: list[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
    """The same chunks, with up to the last `tokens` tokens of the last one in a forward each."""
    *before, (start, stop) = spans
    first = max(start, stop - tokens)
    return [*before, *([(start, first)] if first > start else []), *((at, at + 1) for at in range(first, stop))]


def _is_one(keep: Any) -> bool:
    return isinstance(keep, int) and keep == 1


def _tokens(arguments: dict[str, Any]) -> tuple[Tensor, str]:
    """The new tokens, as ids [B, T] or embeddings [B, T, E], and the argument that holds them.

    Raises:
        InputError: none or both were given, or there is no token.
        UnsupportedFeatureError: something was asked for that a stream of chunks does not give.
    """
    for feature in ("output_attentions", "output_hidden_states"):
        if arguments.get(feature):
            raise UnsupportedFeatureError(f"{feature} is not available with a compressor; use `model.disabled()`")
    names = [n for n in ("input_ids", "inputs_embeds") if arguments.get(n) is not None]
    if len(names) != 1:
        raise InputError("give either input_ids or inputs_embeds")
    tokens = arguments.pop(names[0])
    arguments.pop("input_ids", None)
    arguments.pop("inputs_embeds", None)
    if tokens.ndim < 2 or tokens.shape[1] == 0:
        raise InputError(f"the input is empty: {names[0]} has shape {tuple(tokens.shape)}; give at least one token")
    return tokens, names[0]

"""A causal LM that scores a text: losses, hidden states and last rows of attention, in bounded memory."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from longfit.errors import InputError

STRETCH_TOKENS = 1024  # read at once, a quarter of them for the sake of what follows
LOGIT_ROWS = 128  # rows of logits alive at once
ATTENTION_TOKENS = 512  # tokens of a chunk that is only read into a cache


@dataclass
class LanguageModel:
    """A model and its tokenizer, read without gradients. A wrapped model is read as the base model that it is.

    Attributes:
        own: the tokenizer is the one of the texts that are scored, so that ids need no translation.
        name: what it was loaded by.
    """

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    own: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        self.decoder: Any = self.model.get_decoder()
        self.device: torch.device = self.model.get_input_embeddings().weight.device
        self.config: Any = self.model.config.get_text_config(decoder=True)

    @property
    def window(self) -> int:
        """Positions that the model was made for."""
        return int(getattr(self.config, "max_position_embeddings", 0) or 2**31)

    @property
    def stretch(self) -> int:
        """The longest stretch that is read at once."""
        return min(STRETCH_TOKENS, self.window - 1)

    @property
    def opening(self) -> list[int]:
        """The token that stands before a text, if the model has one: something has to predict the first."""
        first = self.tokenizer.bos_token_id
        return [] if first is None else [int(first)]

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def tensor(self, ids: Sequence[int]) -> Tensor:
        """[1, T] on the model's device."""
        return torch.tensor([list(ids)], dtype=torch.long, device=self.device)

    # -- passes ---------------------------------------------------------------------------------------------------

    def greedy(self, ids: Sequence[int], most: int) -> list[int]:
        """The likeliest continuation of a prompt, token by token, up to `most` tokens or the model's end."""
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        cache, said = DynamicCache(), list[int]()
        last = self.read_into(cache, ids)[-1:]
        while len(said) < most:
            token = int(self.logits(last)[0].argmax())
            if token in ends:
                break
            said.append(token)
            last = self.read_into(cache, [token], seen=len(ids) + len(said) - 1)[-1:]
        return said

    def states(self, ids: Sequence[int]) -> Tensor:
        """Hidden states [T, E] after the final norm, of a text of at most `window` tokens, read at once."""
        return self.decoder(input_ids=self.tensor(ids), use_cache=False).last_hidden_state[0]

    def stretches(self, ids: Sequence[int], before: Sequence[int] = ()) -> Iterator[tuple[int, Tensor]]:
        """Hidden states of a text of any length, stretch by stretch: (first token, states [n, E]).

        Every stretch is read after `before` and after the last quarter of the stretch before it.
        """
        n, context = len(ids), 0
        longest = self.stretch - len(before)
        if longest < 8:
            raise InputError(f"{len(before)} tokens before every stretch leave no room in one of {self.stretch}")
        start = 0
        while start < n:
            context = min(start, longest // 4)
            stop = min(n, start - context + longest)
            given = [*before, *ids[start - context : stop]]
            yield start, self.states(given)[len(before) + context :]
            start = stop

    def read_into(self, cache: DynamicCache, ids: Sequence[int], seen: int = 0) -> Tensor:
        """Read ids after the `seen` tokens that a cache holds, chunk by chunk; the states [T, E] of the last chunk."""
        hidden = None
        for start in range(0, len(ids), ATTENTION_TOKENS):
            part = self.tensor(ids[start : start + ATTENTION_TOKENS])
            positions = torch.arange(seen + start, seen + start + part.shape[1], device=self.device)[None]
            hidden = self.decoder(
                input_ids=part, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[0]
        assert hidden is not None
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, V] from hidden states [T, E] after the final norm."""
        logits = self.model.get_output_embeddings()(hidden.contiguous()).float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    # -- what methods ask -----------------------------------------------------------------------------------------

    def surprise(self, hidden: Tensor, ids: Sequence[int]) -> Tensor:
        """−log p [n] in nats of each of `ids` after the states [n, E] that predict them."""
        targets = torch.tensor(list(ids), device=hidden.device)
        found = []
        for start in range(0, len(ids), LOGIT_ROWS):
            logits = self.logits(hidden[start : start + LOGIT_ROWS])
            chosen = logits.gather(1, targets[start : start + LOGIT_ROWS, None])[:, 0]
            found.append(logits.logsumexp(-1) - chosen)
        return torch.cat(found) if found else torch.zeros(0)

    def losses(self, ids: Sequence[int], before: Sequence[int] = ()) -> Tensor:
        """−log p [n] in nats of every token given what comes before it in its stretch, and `before`."""
        opening = [*self.opening, *before]
        found: list[Tensor] = []
        last: Tensor | None = None
        if opening:
            last = self.states(opening)[-1:]
        for start, hidden in self.stretches(ids, opening):
            stop = start + hidden.shape[0]
            predicting = hidden[:-1] if last is None else torch.cat([last, hidden[:-1]])
            targets = ids[start + (last is None) : stop]
            found.append(self.surprise(predicting, targets))
            if last is None:
                found.insert(0, self.unpredicted())
            last = hidden[-1:]
        return torch.cat([t.cpu().float() for t in found]) if found else torch.zeros(0)

    def losses_apart(self, texts: Sequence[Sequence[int]], rows: int = 16) -> list[Tensor]:
        """The losses of every text read by itself, `rows` of like length at a time, padded on the right."""
        opening, found = self.opening, dict[int, Tensor]()
        order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            longest = max(len(texts[at]) for at in batch)
            given = [[*opening, *texts[at], *[0] * (longest - len(texts[at]))] for at in batch]
            if not longest:
                found |= {at: torch.zeros(0) for at in batch}
                continue
            ids = torch.tensor(given, dtype=torch.long, device=self.device)
            hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
            for row, at in enumerate(batch):
                n, first = len(texts[at]), len(opening)
                predicting = hidden[row, max(first - 1, 0) : first + n - 1]
                losses = self.surprise(predicting, texts[at][not opening :]).cpu().float()
                found[at] = losses if opening else torch.cat([self.unpredicted(), losses])[:n]
        return [found[at] for at in range(len(texts))]

    def unpredicted(self) -> Tensor:
        """[1] the loss of a token that nothing comes before: as surprising as any."""
        return torch.tensor([float(self.config.vocab_size)]).log()

    def last_rows(self, text: Sequence[int], tails: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """For each tail, the attention [L, H, T] of its last token to the T tokens of the text, in every layer.

        The text is read into a cache once. A tail's last token is forwarded alone with its weights in sight, so that no
        other row of the matrix is ever made.
        """
        read = DynamicCache()
        self.read_into(read, text)
        for at, (*before, last) in enumerate(tails):
            cache = read if at == len(tails) - 1 else copy.deepcopy(read)
            if before:
                self.read_into(cache, before, seen=len(text))
            with self._eager():
                given = self.decoder(
                    input_ids=self.tensor([last]),
                    position_ids=self.tensor([len(text) + len(before)]),
                    past_key_values=cache,
                    use_cache=True,
                    output_attentions=True,
                )
            yield torch.stack([row[0, :, 0, : len(text)].float().cpu() for row in given.attentions])

    @contextmanager
    def _eager(self) -> Iterator[None]:
        """Inside, attention weights can be had."""
        name = self.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(name)


def tokenizer_of(model: Any, given: Any, method: str) -> Any:
    """The tokenizer that is given, else the one that lies with the model.

    Raises:
        InputError: there is none.
    """
    if given is not None:
        return given
    from transformers import AutoTokenizer

    place = getattr(model, "name_or_path", "") or ""
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{method} works on text, and the model's tokenizer is not found at {place!r}; give tokenizer="
        ) from error


def checked_scorer(scorer: Any, method: str) -> Any:
    """`scorer` as an option: None, a name, or a pair (model, tokenizer), which becomes a `LanguageModel`.

    Raises:
        InputError: it is none of them.
    """
    if scorer is None or isinstance(scorer, str | LanguageModel):
        return scorer
    if isinstance(scorer, tuple | list) and len(scorer) == 2 and isinstance(scorer[0], PreTrainedModel):
        name = getattr(scorer[0], "name_or_path", "") or type(scorer[0]).__name__
        return LanguageModel(scorer[0], scorer[1], own=False, name=name)
    raise InputError(f"{method}: scorer is a model's name or a pair (model, tokenizer), not {type(scorer).__name__}")


def scorer_of(scorer: Any, model: Any, tokenizer: Any, method: str) -> LanguageModel:
    """The language model that an option, as `checked_scorer` gives it, names; None is the model itself.

    Raises:
        InputError: there is no model.
        LoadError: nothing of that name.
    """
    if scorer is None:
        if model is None:
            raise InputError(f"{method} scores with a language model: give a model, or scorer= a name or a pair")
        return LanguageModel(model, tokenizer, own=True, name=getattr(model, "name_or_path", "") or "")
    if isinstance(scorer, str):
        from longfit.loading import load  # a floor above: only a method that names a model needs it

        like = None if model is None else model.get_input_embeddings().weight
        how: dict[str, Any] = {} if like is None else {"dtype": like.dtype, "device": like.device}
        loaded, tokens = load(scorer, progress=False, **how)
        scorer = LanguageModel(loaded, tokens, own=False, name=scorer)
    own = scorer.tokenizer
    same = own is tokenizer or (tokenizer is not None and own.get_vocab() == tokenizer.get_vocab())
    return replace(scorer, own=same)

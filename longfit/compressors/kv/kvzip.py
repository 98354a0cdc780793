"""KVzip: keep what the model needs to repeat the context."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longfit.cache import SCORE, SINK, View
from longfit.compressors.base import KVCompressor

logger = logging.getLogger("longfit")

QUERY_BLOCK = 64  # so that a block of scores stays in a core's cache


@dataclass
class KVzip(KVCompressor):
    """KVzip: the model is made to repeat the context; an entry's score is the highest attention that any query of the
    repetition paid it, and the highest scores of all layers and heads stay (Kim et al., NeurIPS 2025,
    arXiv:2505.23416, section 3).

    Chunk by chunk, so that the peak stays flat: a chunk is stored, replayed at once, and the whole cache is trimmed
    before the next chunk comes; the paper prefills everything first. Scores of earlier chunks stay as their own replay
    gave them. The softmax of a repeating query runs over the sinks, the chunk and the repetition so far, as in the
    paper. Looks at no question. While decoding, the scores stay and new tokens are safe.

    Args:
        sink_tokens: first tokens that always stay.
        prompt: what asks for the repetition, before the chunk's own tokens; tokenised by the model's own tokenizer
            where it can be found (`model.name_or_path`), otherwise left out.
        prompt_ids: the same as token ids, if you have them.
    """

    name = "kvzip"
    source = "arXiv:2505.23416"
    summary = "keeps what the model needs to repeat the context, over all layers and heads"
    needs_queries = True
    observes = True
    persists = True
    replays = True
    ragged = True
    phases = ("prefill",)

    sink_tokens: int = 4
    prompt: str = "\n\nRepeat the previous context exactly."
    prompt_ids: tuple[int, ...] | None = None
    repeat_ids: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._at_least(0, sink_tokens=self.sink_tokens)

    @property
    def min_tokens(self) -> int:
        return self.sink_tokens + 1

    def bind(self, model: Any) -> None:
        self.repeat_ids = _tokenise(model.name_or_path, self.prompt) if self.prompt_ids is None else self.prompt_ids

    def observe(self, view: View) -> None:
        """Score the replayed chunk: the last `view.replayed` candidates."""
        if not view.replayed:
            return
        C = min(view.replayed, view.size)
        scores = view.scores[SCORE]
        scores[..., -C:] = self._highest_attention(view, C)
        scores.masked_fill_(view.positions < self.sink_tokens, SINK)

    def _highest_attention(self, view: View, C: int) -> Tensor:
        """[B, G, C]: the maximum over queries and heads of the group of softmax over sinks, chunk and repetition."""
        assert view.all_queries is not None
        queries = view.all_queries
        B, _, Q, D = queries.shape
        G = view.keys.shape[1]
        chunk = view.keys[:, :, -C:].mT
        highest = torch.full((B, G, C), float("-inf"), device=queries.device)
        for start in range(0, Q, QUERY_BLOCK):
            block = queries[:, :, start : start + QUERY_BLOCK].reshape(B, G, -1, D)
            normaliser = self._log_sum_exp(view, C, start).reshape(B, G, -1, 1)
            logits = block @ chunk
            # One pass for what would be three: scale, widen to fp32, normalise.
            log_attention = torch.add(normaliser.neg(), logits, alpha=view.scaling)
            highest = torch.maximum(highest, log_attention.amax(2))
        return highest.exp_()

    def _log_sum_exp(self, view: View, C: int, start: int) -> Tensor:
        """[B, H, n] normaliser of one block of queries over sinks, chunk and repetition so far."""
        assert view.all_queries is not None and view.probe_keys is not None and view.log_sum_exp is not None
        stop = min(start + QUERY_BLOCK, view.all_queries.shape[2])
        sinks = min(self.sink_tokens, view.size - C)
        if sinks + C == view.size:
            # Nothing else is stored, so the attention's own normaliser is the one.
            return view.log_sum_exp[:, :, start:stop]
        queries = view.all_queries[:, :, start:stop]
        B, H, n, D = queries.shape
        G = view.probe_keys.shape[1]
        keys = torch.cat([view.keys[:, :, :sinks], view.keys[:, :, -C:], view.probe_keys[:, :, :stop]], 2)
        logits = (queries.reshape(B, G, -1, D) @ keys.mT).float().mul_(view.scaling).view(B, G, H // G, n, -1)
        repetition = torch.arange(stop, device=keys.device)
        logits[..., sinks + C :].masked_fill_(repetition[None] > repetition[start:, None], float("-inf"))
        return logits.logsumexp(-1).view(B, H, n)

    def select(self, views: list[View], scores: list[Tensor], n_keep: int) -> list[Tensor]:
        return self.select_together(scores, n_keep * len(scores))

    def select_together(self, scores: list[Tensor], n_keep: int) -> list[Tensor]:
        """Indices [1, 1, N] to keep in each part, `n_keep` in all."""
        sizes = [given.shape[-1] for given in scores]
        flat = torch.cat([given.flatten() for given in scores])
        mask = torch.zeros(flat.shape[0], dtype=torch.bool, device=flat.device)
        mask[flat.topk(n_keep).indices] = True
        return [part.nonzero().view(1, 1, -1) for part in mask.split(sizes)]

    def score_workspace(self, query_heads: int, kv_heads: int, head_dim: int, chunk: int, kept: int) -> int:
        return 4 * 3 * query_heads * QUERY_BLOCK * 2 * chunk


def _tokenise(name_or_path: str, text: str) -> tuple[int, ...]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
    except (OSError, ValueError):
        logger.warning(
            "kvzip: no tokenizer at %r, so the context is repeated without a prompt; give prompt_ids", name_or_path
        )
        return ()
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)

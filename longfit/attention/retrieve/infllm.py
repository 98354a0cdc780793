"""InfLLM: blocks found by their representatives."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention.base import Scene
from longfit.attention.offload import OffloadingPatch
from longfit.attention.remembered import received
from longfit.cache import SlowTier, take

LOCAL = "local_attention"


@dataclass
class InfLLM(OffloadingPatch):
    """Blocks of tokens whose few most attended keys stand for them; the best blocks are brought in for all heads.

    Xiao et al. 2024, "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory", with
    the constants of the published code (n_init 128, n_local 4096, blocks of 128, 4 representatives, top 16, 32 cached).
    The relevance of a block is the sum over queries, heads and representatives of their dot products (eq. 3), so a
    block needs the mean of its representatives only. Sinks and blocks are attended to at a distance of `window_tokens`.

    Deviations: representatives are chosen for each key/value head by the attention that all its query heads paid (the
    code repeats keys and chooses for each query head); blocks are formed when a chunk has ended, from what leaves the
    window then, so within a chunk longer than `query_tokens` a query may also see, at the limited distance, tokens
    that the code has put into blocks by then. Keys are un-rotated when they leave, from the model's dtype. Beside a
    compressor with head budgets each head chooses blocks of its own.
    """

    name = "infllm"
    source = "Xiao et al. 2024 (InfLLM)"
    summary = "offloaded blocks, brought in by query and representative keys; past the trained window"
    extends = True
    score_names = (LOCAL,)

    representatives: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, representatives=self.representatives)

    def describe(self, keys: Tensor, scores: dict[str, Tensor]) -> Tensor:
        k = min(self.representatives, keys.shape[2])
        return take(keys, scores[LOCAL].topk(k, -1).indices).float().mean(2).to(keys.dtype)

    def choose(self, scene: Scene, tier: SlowTier, queries: Tensor) -> list[list[int]]:
        assert tier.index is not None
        representatives = tier.index.used.float()  # [1, G, pages, D]
        G, D = representatives.shape[1], representatives.shape[-1]
        asked = queries.float().mean(2).view(1, G, -1, D).sum(2)
        relevance = torch.einsum("bgd,bgpd->bp", asked, representatives)
        return [relevance[0].topk(self.top_blocks).indices.tolist()] * G

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        out, log_sum_exp = super().attend(scene)
        received(scene, log_sum_exp, None if scene.packed else self.window_tokens, LOCAL)
        return out, log_sum_exp

    def workspace(self, kv_heads: int, query_heads: int, key_dim: int, dtype_bytes: int, chunk: int, kept: int) -> int:
        scored = 3 * 64 * query_heads * (kept + chunk) * 4
        return max(super().workspace(kv_heads, query_heads, key_dim, dtype_bytes, chunk, kept), scored)

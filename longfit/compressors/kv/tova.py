"""TOVA: drop what the last token attends to least."""

from dataclasses import dataclass

from torch import Tensor

from longfit.cache import View
from longfit.compressors.base import KVCompressor, keep_last


@dataclass
class TOVA(KVCompressor):
    """TOVA: score = attention of the last token, averaged over all heads of the layer, which then keep the same
    entries (Oren et al., 2024, arXiv:2401.06104, section 4.2).

    The paper drops one token at each step; here a chunk of prefill is cut at once. Where the question is known, the
    mean over its tokens takes the place of the last token. Deviation: the last token itself always stays.
    """

    name = "tova"
    source = "arXiv:2401.06104"
    summary = "keeps what the last token attends to, the same for all heads"
    needs_queries = True
    query_aware = True

    @property
    def window_tokens(self) -> int:
        return 1

    @property
    def min_tokens(self) -> int:
        return 2

    def score(self, view: View) -> Tensor:
        attention = view.window_attention().mean((1, 2, 3))
        scores = attention[:, None].repeat(1, view.keys.shape[1], 1)
        return keep_last(scores, 0 if view.probe_keys is not None else 1)

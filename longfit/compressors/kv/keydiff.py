"""KeyDiff: keys unlike the average key are worth keeping."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from longfit.cache import View
from longfit.compressors.base import KVCompressor


@dataclass
class KeyDiff(KVCompressor):
    """KeyDiff: score = -cos(k, anchor), the anchor being the mean of the normalised keys (Park et al., 2025,
    arXiv:2504.15364, equation 5). Chunk by chunk over what is kept and what is new, as the paper runs it.
    """

    name = "keydiff"
    source = "arXiv:2504.15364"
    summary = "keeps the keys least like the average key"

    def score(self, view: View) -> Tensor:
        keys = F.normalize(view.keys.float(), dim=-1)
        anchor = keys.mean(2, keepdim=True)
        return -F.cosine_similarity(keys, anchor, dim=-1)

"""The oracle: exact top-k."""

from dataclasses import dataclass

from torch import Tensor

from longfit.attention.base import Scene
from longfit.attention.select import SelectingPatch
from longfit.cache.products import dot_products


@dataclass
class TopK(SelectingPatch):
    """Attends to the entries of highest dot product, found by computing all of them.

    What every other selector approximates. It saves the reading of values, not of keys.
    """

    name = "topk"
    source = "Gupta et al. 2021, Memory-efficient Transformers via Top-k Attention"
    summary = "exact top-k by dot product: the oracle of the selectors"

    def estimate(self, scene: Scene) -> Tensor:
        assert scene.stored_keys is not None
        B, G, _, D = scene.stored_keys.shape
        scene.read_bytes += scene.stored_keys.numel() * scene.stored_keys.element_size()
        return dot_products(scene.queries.reshape(B, G, -1, D), scene.stored_keys)

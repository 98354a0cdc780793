"""PyramidKV: SnapKV with more entries for the lower layers."""

from dataclasses import dataclass

from longfit.compressors.kv.snapkv import SnapKV


@dataclass
class PyramidKV(SnapKV):
    """PyramidKV: SnapKV's score; layer budgets fall linearly from bottom to top (Cai et al., 2024, arXiv:2406.02069,
    section 3.2; the formula is KVCache-Factory's, as in kvpress).

    With a window of w, a mean budget of N entries and an input of T tokens: the top layer keeps N / beta, the bottom
    2 N - N / beta, but never more than T - w. If a layer would get less than the window, all layers keep N.
    Deviation: where rounding would keep more than L N entries in all, the lowest layers give up one each.

    Args:
        beta: steepness; the top layer keeps 1 / beta of the mean.
    """

    name = "pyramidkv"
    source = "arXiv:2406.02069"
    summary = "SnapKV with layer budgets that fall from bottom to top"

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, beta=self.beta)

    def layer_limit(self, kept_tokens: int, total: int, layer: int, layers: int) -> int:
        return self.layer_limits(kept_tokens, total, layers)[layer]

    def layer_limits(self, kept_tokens: int, total: int, layers: int) -> list[int]:
        """The budget of every layer; their sum is at most `layers * kept_tokens`."""
        if kept_tokens >= total or layers == 1:
            return [kept_tokens] * layers
        lowest = kept_tokens / self.beta
        highest = 2 * kept_tokens - lowest
        if highest >= total - self.window:
            highest = total - self.window
            lowest = 2 * kept_tokens - highest
        if not total >= highest >= lowest >= self.window:
            return [kept_tokens] * layers
        step = (highest - lowest) / (layers - 1)
        limits = [round(highest - layer * step) for layer in range(layers)]
        for layer in range(max(0, sum(limits) - layers * kept_tokens)):
            limits[layer] -= 1
        return limits

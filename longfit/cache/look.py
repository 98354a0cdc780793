"""What the attention function computed, for the method to look at."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Look:
    """What the attention of one forward left for one part.

    queries [b, h, Q, D] without padding, log_sum_exp [b, h, Q], the kept keys as the queries saw them, and what the
    attention wants to remember of the new tokens, [b, g, Q] by name.
    """

    queries: Tensor
    log_sum_exp: Tensor
    stored_keys: Tensor | None
    scores: dict[str, Tensor] = field(default_factory=dict)

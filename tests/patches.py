"""Every attention patch with two sets of options: the one list that all generic tests run over.

`WIDE` options see everything in inputs of up to 200 tokens, `NARROW` ones leave most of 60 tokens out of sight. The
approximations are full attention only where they have nothing to approximate: a segment, or slots, for 256 tokens.
"""

from longfit.attention import AttentionPatch, get
from longfit.attention.controller import ShortKeys

SLOW = {
    "sink_tokens": 2,
    "window_tokens": 7,
    "block_tokens": 4,
    "top_blocks": 2,
    "cached_blocks": 3,
    "query_tokens": 6,
}
WIDE = {
    "adore": {"kept_tokens": 256},
    "block_sparse": {"pattern": "a_shape", "window_tokens": 256},
    "etc": {"window_tokens": 256, "segment_tokens": 16},
    "infini": {"segment_tokens": 256},
    "linformer": {"slots": 256},
    "lm_infinite": {"window_tokens": 256},
    "longformer": {"window_tokens": 256, "global_ids": (7, 11)},
    "longnet": {"segment_tokens": 256, "branches": 1},
    "nystrom": {"slots": 256},
    "infllm": {"window_tokens": 256},
    "ltri": {"window_tokens": 256},
    "offloaded": {"sink_tokens": 3, "window_tokens": 16, "block_tokens": 4, "top_blocks": 60, "cached_blocks": 60},
    "sliding_window": {"window_tokens": 256},
    "swan": {"window_tokens": 256, "global_every": 0},
    "topk": {"top_tokens": 256, "dense_layers": 0},
    "zebra": {"window_tokens": 256},
    "quest": {"top_tokens": 256, "dense_layers": 0},
    "adamas": {"top_tokens": 256, "dense_layers": 0},
    "hadamard_topk": {"top_tokens": 256, "dense_layers": 0},
}
# Of block_sparse the pattern that chooses by position: what the others estimate depends on the chunks.
NARROW = {
    "adore": {
        "kept_tokens": 20,
        "rebuilt_tokens": 3,
        "sink_tokens": 2,
        "recent_tokens": 5,
        "asking_tokens": 4,
        "controller": ShortKeys(watched_layers=2, query_tokens=4, pool_tokens=3),
    },
    "block_sparse": {"pattern": "a_shape", "block_tokens": 4, "sink_tokens": 4, "window_tokens": 8},
    "etc": {"window_tokens": 9, "segment_tokens": 14},
    "infini": {"segment_tokens": 11, "memory_share": 0.3},
    "linformer": {"slots": 6, "recent_tokens": 3, "refresh_tokens": 4},
    "lm_infinite": {"window_tokens": 11, "global_tokens": 3, "distance_limit": 15},
    "longformer": {"window_tokens": 9, "global_positions": (0, 1), "scored_tokens": 4},
    "longnet": {"segment_tokens": 6, "growth": 2, "branches": 3, "sink_tokens": 2},
    "nystrom": {"slots": 7, "recent_tokens": 3, "refresh_tokens": 4, "sink_tokens": 2},
    "infllm": {**SLOW, "representatives": 2},
    "ltri": {**SLOW, "min_span_tokens": 2, "recent_blocks": 1},
    "offloaded": SLOW,
    "sliding_window": {"window_tokens": 11, "sink_tokens": 3},
    "swan": {"window_tokens": 11, "global_every": 2, "trained_tokens": 30},
    "topk": {"top_tokens": 7, "dense_layers": 0},
    "zebra": {"window_tokens": 11, "global_every": 2},
    "quest": {"top_tokens": 12, "page_tokens": 3, "dense_layers": 0},
    "adamas": {"top_tokens": 7, "dense_layers": 0, "thresholds": "calibrated"},
    "hadamard_topk": {"top_tokens": 7, "dense_layers": 0},
}
REFUSED_FAMILIES = {"adore": {"gemma3_text": "sliding window"}}  # and what the error says
CHOOSES_ITSELF = {"adore"}  # which tokens stay: refuses compressors


def wide(name: str) -> AttentionPatch:
    return get(name, **WIDE[name])


def narrow(name: str) -> AttentionPatch:
    return get(name, **NARROW[name])

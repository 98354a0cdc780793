"""Every attention patch with two sets of options: the one list that all generic tests run over.

`WIDE` options see everything in inputs of up to 200 tokens, `NARROW` ones leave most of 60 tokens out of sight.
"""

from longfit.attention import AttentionPatch, get

WIDE = {
    "sliding_window": {"window_tokens": 256},
    "topk": {"top_tokens": 256, "dense_layers": 0},
}
NARROW = {
    "sliding_window": {"window_tokens": 11, "sink_tokens": 3},
    "topk": {"top_tokens": 7, "dense_layers": 0},
}


def wide(name: str) -> AttentionPatch:
    return get(name, **WIDE[name])


def narrow(name: str) -> AttentionPatch:
    return get(name, **NARROW[name])

"""Every registered method with options that fit tiny inputs: the one list that all generic tests run over."""

from longfit.compressors import SnapKV, available_kv, get

SMALL = {
    "snapkv": {"window": 6},
    "pyramidkv": {"window": 4, "beta": 4},
    "finch": {"window": 6},
    "lagkv": {"lag_tokens": 8},
    "chunkkv": {"span_tokens": 5, "scorer": SnapKV(window=6)},
    "adakv": {"scorer": SnapKV(window=6)},
    "expected_attention": {"future_tokens": 16},
    "kvzip": {"prompt_ids": (5, 6, 7)},
}


def make(name: str):
    return lambda: get(name, **SMALL.get(name, {}))


METHODS = {name: make(name) for name in available_kv()}

"""Learned compressors bound to tiny models: the one list that the generic tests run over, and what they need.

A method that another model encodes for (`foreign_encoder`) and one that has to be told the question are not in the
list; their own tests bring that model and that question. `FOREIGN` has the forms with another model, which take text
apart into tokens of their own, for what is tested through `wrap`.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from longfit.compressors.soft import Encoded, LearnedCompressor, available
from tests.encoders import tiny_bert
from tests.tiny import tiny_model
from tests.tiny_models_on_disk import tiny_llama, tiny_tokenizer
from tests.tiny_training import byte_tokenizer

FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt_neox"]
OPTIONS = {
    "ratio": 3,
    "segment_tokens": 9,
    "sink_tokens": 1,
    "window_tokens": 1,
    "rank": 2,
    "adapter": "untrained",
}
# Options that fit tiny inputs, for methods whose defaults do not.
SMALL: dict[str, dict] = {
    "arc": {"cut_layers": 1},
    "cepe": {"sink_tokens": 0, "encoder_layers": 1},
    "cramming": {"sink_tokens": 0, "steps": 2},
    "cramming_kv": {"sink_tokens": 0, "steps": 2},
    "gist": {"autoencode": True},
    "lcirc": {"sink_tokens": 0},
    "nugget": {"scorer_layer": 1},
}
# Further forms of a method, by the name of the test case.
FORMS: dict[str, tuple[str, dict]] = {
    "gist coarse": ("gist", {"form": "coarse"}),
    "autocompressor replacing": ("autocompressor", {"accumulate": False}),
    "autocompressor spread": ("autocompressor", {"slot_positions": "spread", "lowest_ratio": 1}),
    "sentinel_tokens keep_raw": ("sentinel_tokens", {"keep_raw": True}),
}
METHODS: dict[str, tuple[str, dict]] = {
    name: (name, SMALL.get(name, {}))
    for name, method in available().items()
    if not (method.foreign_encoder or method.query_aware)
} | FORMS


# Forms that another model encodes for, made anew each time: adapters are put into that model.
FOREIGN: dict[str, Callable[[], tuple[str, dict]]] = {
    "arc foreign": lambda: (
        "arc",
        {"encoder": (tiny_llama(), tiny_tokenizer()), "tokenizer": byte_tokenizer(), "cut_layers": 0},
    ),
    "e2llm": lambda: ("e2llm", {"encoder": (tiny_bert(), tiny_tokenizer()), "tokenizer": byte_tokenizer()}),
}


def form(case: str) -> tuple[str, dict]:
    """Name and options of a method of either list."""
    return METHODS[case] if case in METHODS else FOREIGN[case]()


def bound(case: str, family: str, dtype: torch.dtype = torch.float32, trained: bool = False, **options):
    """A method of either list, bound to a tiny model of the family.

    Args:
        trained: weights moved away from where they start, so that adapters and modules do something.
    """
    name, own = form(case)
    compressor = available()[name](**{**OPTIONS, **own, **options}).bind(tiny_model(family, dtype))
    if trained:
        move(compressor)
    return compressor


@cache
def shared(case: str, family: str):
    """`bound(case, family, trained=True)`, made once: for tests that change nothing of it."""
    return bound(case, family, trained=True)


def copy_weights(giver: LearnedCompressor, taker: LearnedCompressor) -> None:
    """Give one bound compressor the trained weights of another."""
    for name, group in giver.parameters().items():
        for mine, theirs in zip(group, taker.parameters()[name], strict=True):
            theirs.data.copy_(mine.data)


def move(compressor: LearnedCompressor, by: float = 0.05) -> None:
    """Add noise to everything that trains."""
    generator = torch.Generator().manual_seed(3)
    for group in compressor.parameters().values():
        for parameter in group:
            parameter.data += by * torch.randn(parameter.shape, generator=generator).to(parameter)


def words(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Random ids [B, T]."""
    return torch.randint(2, 100, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def tensors(encoded: Encoded) -> list[Tensor]:
    """Every tensor of a memory."""
    given = [t for t in (encoded.soft, encoded.states, encoded.scores) if t is not None]
    return given + [t for entries in encoded.layers or () for t in entries] + [encoded.sources]


def has_first(compressor: LearnedCompressor) -> bool:
    """Something stands before the first token that the reader reads, so it can be predicted."""
    return compressor.memory == "soft" or bool(compressor.cues)

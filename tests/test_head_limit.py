"""Heads that keep unlike numbers of entries: in the packed geometry the longest stays within the model's window."""

from dataclasses import dataclass

import pytest
import torch

import longfit
from longfit.cache.trim import hold_to
from longfit.compressors import AdaKV, KVCompressor, KVzip
from tests.test_attention import prompt
from tests.tiny import tiny_model

WINDOW = 512


class OneHead(KVCompressor):
    """Everything in the first head of each layer, the latest first."""

    def score(self, view):
        return view.positions.float() + (1e6 if view.first_head == 0 else 0.0)


@dataclass
class OneHeadZip(KVzip):
    """The same, over all layers."""

    def observe(self, view):
        if view.replayed:
            view.scores["score"].copy_(OneHead.score(self, view) + (1e9 if view.layer == 0 else 0.0))


def longest(cache):
    return max(n for layer in cache.bounded for row in layer.kept_by_head() for n in row)


@pytest.mark.parametrize(
    ("method", "after"), [(AdaKV(OneHead(), safeguard=0.0), 64), (OneHeadZip(prompt_ids=(3, 4)), 130)]
)
def test_a_head_that_wants_everything_gets_what_fits_the_window(method, after):
    fitted = longfit.wrap(tiny_model("llama"), method, budget="300 tokens", chunk_tokens=64)
    memory = fitted.compress(prompt(1, 1200))
    assert memory.kept_tokens == 300  # on average, as asked
    assert longest(memory.cache) == WINDOW - after
    assert max(memory.cache.ledger.base) <= WINDOW  # where the next token stands
    shorter = longfit.unwrap(fitted)
    fitted = longfit.wrap(shorter, method, budget="200 tokens", chunk_tokens=64)
    memory = fitted.compress(prompt(1, 300))  # within the window, in the geometry of the text: no limit
    assert memory.cache.ledger.head_limit is None and longest(memory.cache) > 236


def test_the_best_of_a_head_stay_and_others_make_up_the_number():
    scores = torch.tensor([[[5.0, 1.0, 4.0, 3.0]]])
    positions = torch.arange(4).view(1, 1, 4)
    hold_to(scores, 2, positions)
    assert scores.argsort(-1, descending=True)[0, 0].tolist() == [0, 2, 3, 1]  # the newest of the others first
    before = scores.clone()
    hold_to(scores, 4, positions)
    hold_to(scores, None, positions)
    assert torch.equal(scores, before)

"""Caches that run side by side answer as each does alone, whatever their methods and budgets."""

from types import SimpleNamespace

import pytest
import torch

import longfit
from longfit.cache import SideBySide
from longfit.errors import InputError
from longfit.eval.answering import Reader, likelihood
from longfit.eval.together import generate_together, likelihoods_together
from tests.methods import METHODS
from tests.patches import NARROW, narrow
from tests.tiny import FAMILIES, tiny_model

TOKENS, NEW = 60, 6


class Numbers:
    """Decodes token ids as numbers, so that texts can be compared."""

    @staticmethod
    def decode(ids, skip_special_tokens=True):
        return " ".join(str(int(token)) for token in ids)


class Unsettled:
    @staticmethod
    def settled(text, sample):
        return False


def asked(model, limit=NEW):
    return Reader(model, Numbers(), limit)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_method_answers_beside_the_others_as_alone(family: str) -> None:
    model = tiny_model(family)
    ids, question = torch.randint(3, 100, (1, TOKENS)), torch.randint(3, 100, (1, 7))
    expected, caches = [], []
    for number, name in enumerate(sorted(METHODS)):
        method, budget = METHODS[name](), f"{30 + 5 * (number % 4)}%"
        wrapped = longfit.wrap(model, method, budget=budget, chunk_tokens=TOKENS)
        memory = wrapped.compress(ids)
        out = wrapped.generate(question, memory=memory, max_new_tokens=NEW, do_sample=False)
        expected.append(Numbers.decode(out[0, 7:]))
        caches.append(memory.cache)
    wrapped = longfit.wrap(model, "knorm", budget="100%")
    outcomes = generate_together(asked(wrapped), Unsettled(), None, caches, question)
    assert [outcome.text for outcome in outcomes] == expected
    assert all(outcome.new_tokens == NEW for outcome in outcomes)


def _sample(targets: int) -> SimpleNamespace:
    ids = torch.randint(3, 100, (targets,), generator=torch.Generator().manual_seed(3)).tolist()
    return SimpleNamespace(question_ids=(5,), target_ids=tuple(ids))


@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
def test_likelihoods_side_by_side_are_those_of_each_alone_decoding(family: str) -> None:
    model, sample = tiny_model(family), _sample(12)
    ids = torch.randint(3, 100, (1, TOKENS))
    expected, caches = [], []
    for name in sorted(n for n in NARROW if narrow(n).phases == ("decode",)):
        wrapped = longfit.wrap(model, attention=narrow(name), chunk_tokens=TOKENS)
        cache = wrapped.compress(ids).cache
        caches.append(cache.fork())
        expected.append(likelihood(Reader(wrapped, None), sample, cache).nll)
    wrapped = longfit.wrap(model, "knorm", budget="100%")
    found = [outcome.nll for outcome in likelihoods_together(Reader(wrapped, None), sample, caches)]
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-4)


@pytest.mark.parametrize("name", sorted(NARROW))
def test_a_chunk_of_targets_stands_for_decoding_only_where_the_patch_says_so(name: str) -> None:
    model, sample = tiny_model("llama"), _sample(12)
    wrapped = longfit.wrap(model, attention=narrow(name), chunk_tokens=TOKENS)
    memory = wrapped.compress(torch.randint(3, 100, (1, TOKENS), generator=torch.Generator().manual_seed(4)))
    found = likelihood(Reader(wrapped, None), sample, memory.fork(wrapped._fingerprint())).nll
    cache, given, by_token = memory.fork(wrapped._fingerprint()), sample.question_ids[0], []
    for target in sample.target_ids:
        with torch.no_grad():
            logits = wrapped(torch.tensor([[given]]), past_key_values=cache, use_cache=True).logits[0, -1]
        by_token.append(-float(logits.log_softmax(-1)[target]))
        given = target
    assert torch.allclose(torch.tensor(found), torch.tensor(by_token), atol=1e-4)


def test_rows_end_one_by_one() -> None:
    model = tiny_model("llama")
    ids, question = torch.randint(3, 100, (1, TOKENS)), torch.randint(3, 100, (1, 7))
    wrapped = longfit.wrap(model, "knorm", budget="40%")
    memory = wrapped.compress(ids)
    whole = generate_together(asked(wrapped), Unsettled(), None, [memory.cache.fork()], question)[0].text.split()
    ends = SimpleNamespace(settled=lambda text, sample: text.startswith(whole[0]) and len(text.split()) >= 2)
    outcome = generate_together(asked(wrapped), ends, None, [memory.cache.fork(), memory.cache.fork()], question)
    assert [o.text.split() for o in outcome] == [whole[:2]] * 2
    model.generation_config.eos_token_id = int(whole[2])
    outcome = generate_together(asked(wrapped), Unsettled(), None, [memory.cache.fork()], question)
    assert outcome[0].text.split() == whole[: whole.index(whole[2]) + 1]


def test_caches_that_do_not_belong_together_are_refused() -> None:
    model = longfit.wrap(tiny_model("llama"), "knorm", budget="40%")
    caches = [model.compress(torch.randint(3, 100, (1, n))).cache for n in (60, 50)]
    with pytest.raises(InputError, match="as many tokens"):
        SideBySide(caches)
    with pytest.raises(InputError, match="one row each"):
        SideBySide([])

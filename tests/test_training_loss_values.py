"""The value of every loss of the student, against plain torch on the logits of the model itself."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch

from longfit.training.batches import Batch
from longfit.training.student import LossOptions, Student
from tests.soft_models import bound, words
from tests.tiny import tiny_model

CONTEXT, IDS = words(2, 21), words(2, 6, seed=1)
WEIGHTS = torch.tensor([[1.0, 4, 4, 0, 1, 0], [3, 1, 1, 0, 2, 1]])
ANSWERS = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
# Of the second row, which has no answers, all tokens that weigh anything.
COUNTED = torch.tensor([[0.0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 1, 1]])
BATCH = Batch(CONTEXT, IDS, WEIGHTS, ANSWERS, ["a", "b"])
N, RATIO = CONTEXT.shape[1], 3
FIRST_ONLY = replace(BATCH, weights=torch.tensor([[1.0, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]]), answers=ANSWERS & False)


@cache
def plain():
    """The model that no compressor has touched."""
    return tiny_model("llama")


def student(case, options=None, **given):
    return Student(bound(case, "llama", trained=True, **given), LossOptions(**(options or {})))


def losses(made, *names, batch=BATCH):
    return made(batch, dict.fromkeys(names, 1.0), RATIO)


def after_slots(made, ids, soft, cue=None):
    """Logits for all of `ids`, by the untouched model, after slots that are embeddings and a cue."""
    embed = plain().get_input_embeddings()
    before = [soft] if cue is None else [soft, made.compressor.modules["cues"][cue](2, torch.float32)]
    before = torch.cat(before, 1)
    given = plain()(inputs_embeds=torch.cat([before, embed(ids)], 1)).logits
    return given[:, before.shape[1] - 1 : -1]


def icae_logits(made, ids=IDS, cue=None):
    return after_slots(made, ids, made.compressor.compress(CONTEXT, ratio=RATIO).soft, cue)


def teacher_logits():
    return plain()(torch.cat([CONTEXT, IDS], 1)).logits[:, N - 1 : -1]


def nll(logits, ids):
    return -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def mean(values, weights):
    return (values * weights).sum() / weights.sum()


def kl(teacher, logits):
    p, q = teacher.softmax(-1), logits.softmax(-1)
    return (p * (p / q).log()).sum(-1)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-4)


def test_kl_ce_and_lm_after_soft_slots_count_every_token():
    made = student("icae")
    found, logits = losses(made, "kl", "ce", "lm"), icae_logits(made)
    close(found["kl"], mean(kl(teacher_logits(), logits), WEIGHTS))
    close(found["ce"], mean(nll(logits, IDS), COUNTED))
    close(found["lm"], mean(nll(logits, IDS), WEIGHTS))
    close(found["loss"], found["kl"] + found["ce"] + found["lm"])


def test_kl_ce_and_lm_after_keys_and_values_count_all_but_the_first_token():
    made = student("strided_kv")
    found = losses(made, "kl", "ce", "lm")
    compressor = made.compressor
    logits = compressor.read(compressor.compress(CONTEXT, ratio=RATIO), IDS)
    close(found["kl"], mean(kl(teacher_logits()[:, 1:], logits), WEIGHTS[:, 1:]))
    close(found["ce"], mean(nll(logits, IDS[:, 1:]), COUNTED[:, 1:]))
    close(found["lm"], mean(nll(logits, IDS[:, 1:]), WEIGHTS[:, 1:]))


def test_a_memory_of_keys_and_values_of_every_token_has_no_divergence_and_the_models_own_likelihood():
    made = Student(bound("strided_kv", "llama"), LossOptions())
    found = made(BATCH, {"kl": 1.0, "lm": 1.0}, 1)
    assert found["kl"].abs() < 1e-5
    close(found["lm"], mean(nll(teacher_logits(), IDS)[:, 1:], WEIGHTS[:, 1:]))


def test_kl_of_the_likeliest_tokens_and_the_rest():
    made = student("icae", {"kl_top_k": 5})
    p, q = teacher_logits().softmax(-1), icae_logits(made).softmax(-1)
    p_kept, places = p.topk(5, -1)
    q_kept = q.gather(-1, places)
    p_rest, q_rest = 1 - p_kept.sum(-1), 1 - q_kept.sum(-1)
    wanted = (p_kept * (p_kept / q_kept).log()).sum(-1) + p_rest * (p_rest / q_rest).log()
    close(losses(made, "kl")["kl"], mean(wanted, WEIGHTS))


def test_kl_at_a_temperature():
    made = student("icae", {"kl_temperature": 2.5})
    wanted = 2.5**2 * kl(teacher_logits() / 2.5, icae_logits(made) / 2.5)
    close(losses(made, "kl")["kl"], mean(wanted, WEIGHTS))


@pytest.mark.parametrize("skip", [0, 3])
def test_continuation_stands_after_its_cue_and_leaves_out_the_tokens_to_skip(skip):
    made = student("icae", {"skip_first": skip})
    weights = WEIGHTS.clone()
    weights[:, :skip] = 0
    wanted = mean(nll(icae_logits(made, cue="continuation"), IDS), weights)
    close(losses(made, "continuation")["continuation"], wanted)


def test_tokens_to_skip_are_counted_from_the_memory_where_the_first_is_given():
    made = student("strided_kv", {"skip_first": 2})
    logits = made.compressor.read(made.compressor.compress(CONTEXT, ratio=RATIO), IDS)
    close(losses(made, "continuation")["continuation"], mean(nll(logits, IDS[:, 1:])[:, 1:], WEIGHTS[:, 2:]))


def test_tokens_that_the_context_helps_more_weigh_more():
    gamma = 1.0
    made = student("icae", {"tie_gamma": gamma})
    full = -nll(teacher_logits(), IDS)[:, 1:]
    alone = -nll(plain()(IDS).logits[:, :-1], IDS[:, 1:])
    raw = (full - alone).clamp(max=gamma).exp()
    factor = torch.cat([torch.ones(2, 1), raw / mean(raw, (WEIGHTS[:, 1:] > 0).float())], 1)
    logits = icae_logits(made)
    found = losses(made, "ce", "lm", "continuation", "kl")
    close(found["ce"], mean(nll(logits, IDS), COUNTED * factor))
    close(found["lm"], mean(nll(logits, IDS), WEIGHTS * factor))
    close(found["continuation"], mean(nll(icae_logits(made, cue="continuation"), IDS), WEIGHTS * factor))
    close(found["kl"], mean(kl(teacher_logits(), logits), WEIGHTS))


def test_ae_spells_the_whole_context_after_its_cue():
    made = student("icae")
    close(losses(made, "ae")["ae"], nll(icae_logits(made, CONTEXT, "ae"), CONTEXT).mean())


def test_ae_gives_the_first_token_where_nothing_could_predict_it():
    made = student("strided_kv")
    logits = made.compressor.read(made.compressor.compress(CONTEXT, ratio=RATIO), CONTEXT)
    close(losses(made, "ae")["ae"], nll(logits, CONTEXT[:, 1:]).mean())


def test_next_segment_counts_every_token_after_the_first_segment():
    made = student("icae")
    segments, encoded, found = segments_of(made), None, []
    for segment, then in pairwise(segments):
        encoded = made.compressor.encode(segment, encoded, RATIO)
        found.append(nll(after_slots(made, then, encoded.soft), then))
    assert len(found) == 2
    close(losses(made, "next_segment")["next_segment"], torch.cat(found, 1).mean())


def segments_of(made):
    return [CONTEXT[:, start:stop] for start, stop in made.compressor.spans(N)]


@pytest.mark.parametrize("cut", [False, True])
def test_next_segment_cuts_the_graph_between_segments_and_not_before_a_segment_is_read(cut):
    made = student("autocompressor", {"detach_segments": int(cut)}, detach_every=0)
    given = torch.autograd.grad(losses(made, "next_segment")["loss"], list(made.trained().values()))
    wanted, unlike = gradients(made, cut), gradients(made, not cut)
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-3)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(given, unlike, strict=True))


def gradients(made, cut):
    """Of the second and third segment's mean likelihood, the third's with or without the way through the second."""
    first, second, third = segments_of(made)
    compressor = made.compressor
    early = compressor.encode(first, None, RATIO)
    late = compressor.encode(second, early.detach() if cut else early, RATIO)
    parts = [nll(compressor.read(early, second, first=0), second), nll(compressor.read(late, third, first=0), third)]
    return torch.autograd.grad(torch.cat(parts, 1).mean(), list(made.trained().values()))


@pytest.mark.parametrize("case", ["icae", "autocompressor", "mean_pool", "arc"])
@pytest.mark.parametrize("name", ["kl", "ce", "lm", "continuation"])
def test_the_first_token_after_soft_slots_is_trained(case, name):
    made = student(case)
    loss = losses(made, name, batch=FIRST_ONLY)["loss"]
    assert loss > 0.1
    loss.backward()
    moved = {group for group, given in made.compressor.parameters().items() if any_gradient(given)}
    assert "encoder" in moved


def any_gradient(parameters):
    return any(p.grad is not None and p.grad.abs().max() > 1e-6 for p in parameters)


def test_the_first_token_after_keys_and_values_is_trained_only_after_a_cue():
    found = losses(student("compressor_500x"), "kl", "ce", "lm", "continuation", batch=FIRST_ONLY)
    assert found["continuation"] > 0.1
    assert found["kl"] == found["ce"] == found["lm"] == 0


def test_without_slots_the_first_token_is_given(monkeypatch):
    made = student("icae")
    held = made.compressor.compress(CONTEXT, ratio=RATIO)
    empty = replace(held, soft=held.soft[:, :0], sources=held.sources[:0])
    monkeypatch.setattr(made.compressor, "compress", lambda *given, **options: empty)
    wanted = mean(nll(plain()(IDS).logits[:, :-1], IDS[:, 1:]), WEIGHTS[:, 1:])
    close(losses(made, "lm")["lm"], wanted)

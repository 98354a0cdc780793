"""What one optimizer step does: the rate of each group, the gradient of micro-batches, clipping, precision."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState

from longfit.training import run
from longfit.training.batches import Batch, Batches
from longfit.training.student import Student
from tests.tiny_training import loaded, recipe

METHOD = {"compressor": {"autocompressor": {"rank": 2, "segment_tokens": 48}}, "losses": {"lm": 1.0}}
PLAIN = {"warmup_steps": 0, "final_lr": 1.0, "steps": 1}


@pytest.fixture
def steps(monkeypatch):
    """What the optimizer found and did in every step: gradients, how far each group moved, and its dtype."""
    plain, seen = torch.optim.AdamW.step, []

    def step(optimizer, *given, **options):
        groups = optimizer.param_groups
        before = [[p.detach().clone() for p in group["params"]] for group in groups]
        gradients = [p.grad.clone() for group in groups for p in group["params"] if p.grad is not None]
        plain(optimizer, *given, **options)
        moved = {
            group["name"]: max(
                float((p.detach() - old).abs().max()) for p, old in zip(group["params"], olds, strict=True)
            )
            for group, olds in zip(groups, before, strict=True)
        }
        kinds = {p.dtype for group in groups for p in group["params"]}
        seen.append({"gradients": gradients, "moved": moved, "dtypes": kinds})

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return seen


def train(folder, **changes):
    run(recipe(**{**METHOD, **changes}), folder, loaded=loaded(), quiet=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_group_moves_at_its_own_rate(tmp_path, steps):
    # Adam's first step moves a weight by its rate, whatever the size of its gradient.
    train(tmp_path, **PLAIN, lr=1e-3, lr_factors={"slots": 5, "gain": 0.5}, clip=1e9)
    wanted = {"encoder": 1e-3, "slots": 5e-3, "gain": 5e-4}
    assert steps[0]["moved"] == pytest.approx(wanted, rel=0.01)


def test_the_rate_of_a_group_follows_the_schedule(tmp_path, steps):
    lines = train(tmp_path, steps=1, warmup_steps=4, lr=1e-3, lr_factors={"slots": 5}, clip=1e9)
    assert lines[0]["lr"] == pytest.approx(2.5e-4)
    assert steps[0]["moved"] == pytest.approx({"encoder": 2.5e-4, "slots": 1.25e-3, "gain": 2.5e-4}, rel=0.01)


def norm(gradients):
    return float(torch.stack([g.norm() for g in gradients]).norm())


def test_gradients_are_clipped_to_the_norm_and_the_log_has_the_one_before(tmp_path, steps):
    (free,) = train(tmp_path / "free", **PLAIN, clip=1e9)
    (clipped,) = train(tmp_path / "clipped", **PLAIN, clip=0.01)
    before, after = (norm(step["gradients"]) for step in steps)
    assert before > 0.1 and after == pytest.approx(0.01, rel=1e-3)
    assert free["grad_norm"] == pytest.approx(before, rel=1e-4) == pytest.approx(clipped["grad_norm"], rel=1e-4)
    for given, wanted in zip(steps[1]["gradients"], steps[0]["gradients"], strict=True):
        torch.testing.assert_close(given, wanted * (0.01 / before), atol=1e-7, rtol=1e-3)


def rows_of(batches, step, context_tokens, micro=0, process=0):
    """Rows micro x B to (micro + 1) x B of one fixed text; every token weighs 1."""
    generator = torch.Generator().manual_seed(5)
    context, ids = (torch.randint(2, 250, (6, tokens), generator=generator) for tokens in (context_tokens, 7))
    rows = slice(micro * batches.batch_size, (micro + 1) * batches.batch_size)
    context, ids = context[rows], ids[rows]
    return Batch(context, ids, torch.ones(ids.shape), torch.zeros(ids.shape).bool(), ["fixed"] * len(ids))


@pytest.mark.parametrize("accumulate", [2, 3])
def test_micro_batches_give_the_gradient_of_one_batch_of_all_their_rows(tmp_path, steps, monkeypatch, accumulate):
    monkeypatch.setattr(Batches, "batch", rows_of)
    # Segments of fixed length: they are drawn for each micro-batch else.
    common = {**PLAIN, "compressor": {"icae": {"rank": 2}}, "clip": 1e9}
    (whole,) = train(tmp_path / "whole", **common, batch_size=6)
    (parts,) = train(tmp_path / "parts", **common, batch_size=6 // accumulate, accumulate=accumulate)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    one, several = (step["gradients"] for step in steps)
    assert norm(one) > 0.1
    for given, wanted in zip(several, one, strict=True):
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-3)


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps the precision of a process's first run; this forgets it, before and afterwards."""
    AcceleratorState._reset_state(True)
    yield AcceleratorState._reset_state
    AcceleratorState._reset_state(True)


def test_bf16_autocast_trains_fp32_weights_on_a_cpu(tmp_path, steps, monkeypatch, fresh_accelerate):
    plain, inside = Student.forward, []

    def forward(student, *given):
        inside.append((torch.is_autocast_enabled("cpu"), next(student.model.parameters()).dtype))
        return plain(student, *given)

    (exact, *_) = train(tmp_path / "fp32", steps=3)
    fresh_accelerate(True)
    monkeypatch.setattr(Student, "forward", forward)
    lines = train(tmp_path / "bf16", steps=3, mixed_precision="bf16")
    assert inside == [(True, torch.float32)] * 3
    assert len(lines) == 3 and all(line["grad_norm"] > 0 for line in lines)
    assert 0 < abs(lines[0]["loss"] - exact["loss"]) < 0.05 * exact["loss"]
    assert all(step["dtypes"] == {torch.float32} for step in steps)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for step in steps for g in step["gradients"])

"""The Triton kernels in Triton's interpreter on a CPU, against plain torch.

The interpreter has to be asked for before Triton is first imported, and torch imports Triton on its own in other tests:
the checks run in one process of their own, `python -m tests.kernel_checks`, and are reported here one by one.
"""

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from longfit.attention import kernels
from longfit.attention.kernels import dispatch, naive
from longfit.cache.side_index import pack_bits
from longfit.errors import InputError
from tests.kernel_checks import CHECKS


def no_interpreter() -> str:
    """Why Triton's interpreter cannot run here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    installed = {name: Version(metadata.version(name)) for name in ("triton", "numpy")}
    if installed["triton"] < Version("3.7") and installed["numpy"] >= Version("2.4"):
        return "the interpreter of Triton before 3.7 does not run with numpy 2.4 or newer"
    return ""


interpreted = pytest.mark.skipif(bool(no_interpreter()), reason=no_interpreter())


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What became of every check: an empty string, or what was wrong."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernel_checks"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@interpreted
@pytest.mark.parametrize("check", CHECKS)
def test_the_kernel_agrees_with_plain_torch(check: str, outcomes: dict[str, str]) -> None:
    assert not outcomes[check], outcomes[check]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has its own test, test_kernels_gpu.py")
def test_without_a_gpu_no_triton_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch._runs.cache_clear()
    assert not kernels.available("cpu") and not kernels.available("cuda")
    codes = pack_bits(torch.randint(0, 4, (1, 2, 9, 8), dtype=torch.uint8))
    assert torch.equal(kernels.code_nearness(codes[:, :, :3], codes), naive.code_nearness(codes[:, :, :3], codes))
    queries, levels = torch.randn(1, 2, 3, 8), (-2.0, -0.5, 0.5, 2.0)
    expected = naive.code_products(queries, codes, levels)
    torch.testing.assert_close(kernels.code_products(queries, codes, levels), expected)
    scores = torch.randn(1, 6, 50)
    assert torch.equal(kernels.select_top(scores, 7).sort(-1).values.int(), naive.select_top(scores, 7))


@pytest.mark.parametrize("chosen", [6, 2])
def test_the_plain_way_of_attending_agrees_with_the_slow_reference(chosen: int) -> None:
    queries, keys, values = torch.randn(2, 6, 1, 60), torch.randn(2, 2, 1, 60), torch.randn(2, 2, 1, 20)
    stored = torch.randn(2, 2, 70, 60)[:, :, :63], torch.randn(2, 2, 63, 20)
    slots = torch.rand(2, chosen, 63).argsort(-1)[..., :17]
    given = kernels.attend_slots(queries, keys, values, stored, slots, 0.1)
    for a, b in zip(given, naive.attend_slots(queries, keys, values, stored, slots, 0.1), strict=True):
        torch.testing.assert_close(a, b)


def test_kernels_are_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_runs", lambda device: True)
    assert all(kernels.available("cpu", kernel) for kernel in dispatch.KERNELS)
    monkeypatch.setenv(dispatch.VARIABLE, "scan, attend")
    assert kernels.available("cpu", "scan") and not kernels.available("cpu", "top")
    monkeypatch.setenv(dispatch.VARIABLE, "plain")
    assert not kernels.available("cpu")
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    with pytest.raises(InputError, match="scan, top, attend"):
        kernels.available("cpu")

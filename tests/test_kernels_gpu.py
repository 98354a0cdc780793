"""The Triton kernels on a GPU, against plain torch; the same checks as in the interpreter, and larger inputs."""

import pytest
import torch

from longfit.attention import kernels
from tests import kernel_checks
from tests.kernel_checks import CHECKS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and not kernels.available("cuda"),
        reason="needs Triton, compute capability 8.0 or newer and LONGFIT_KERNELS unset",
    ),
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_kernel_agrees_with_plain_torch(check: str) -> None:
    CHECKS[check]("cuda")


def test_codes_of_many_keys() -> None:
    kernel_checks.scan((2, 8, 4, 50_001, 128), "cuda")


@pytest.mark.parametrize("k", [64, 1024])
def test_top_of_many_scores(k: int) -> None:
    kernel_checks.top((32, 131_072), k, "cuda")


@pytest.mark.parametrize("shared", [False, True])
def test_attention_to_many_entries(shared: bool) -> None:
    kernel_checks.attend(4, 8, 4, 20_011, 128, 128, 1024, shared, torch.bfloat16, "cuda")

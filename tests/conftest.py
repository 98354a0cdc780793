"""Shared fixtures: one thread for tiny models (two contend on small machines), the real models loaded once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32 and its tokenizer."""
    return _packaged("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3():
    """Gemma-3-270M (hybrid sliding and full layers) in float32 and its tokenizer."""
    return _packaged("gemma-3-270m")


def _packaged(name: str):
    from tests.test_loading import load_real

    return load_real(name, dtype=torch.float32)

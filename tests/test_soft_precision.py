"""Learned compressors in float16: they run, and say that this is not the type for them."""

import warnings

import pytest
import torch

import longfit
from longfit.compressors import get
from longfit.errors import PrecisionWarning
from tests.soft_models import METHODS, OPTIONS, bound, words
from tests.tiny import tiny_model


@pytest.mark.parametrize("case", ["strided_kv", "icae", "cepe"])
def test_float16_is_warned_of_and_runs(case):
    with pytest.warns(PrecisionWarning, match=rf"{METHODS[case][0]}: the model is in float16.*bfloat16"):
        compressor = bound(case, "llama", torch.float16, trained=True)
    with torch.no_grad():
        logits = compressor.read(compressor.compress(words(1, 20)), words(1, 5, seed=1))
    assert logits.dtype == torch.float16 and logits.isfinite().all()


def test_wrapping_a_model_in_float16_warns_too():
    with pytest.warns(PrecisionWarning, match=r"float32"):
        longfit.wrap(tiny_model("llama", torch.float16), get("strided_kv", **OPTIONS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_other_types_are_not_warned_of(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrecisionWarning)
        bound("strided_kv", "llama", dtype)

"""The Triton kernels compile for an H100 down to machine code, which needs no GPU: PTX in them is not interpreted."""

import importlib.util
import os
from typing import Any

import pytest

missing = importlib.util.find_spec("triton") is None
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(missing, reason="Triton is not installed: pip install triton"),
    pytest.mark.skipif(interpreted, reason="TRITON_INTERPRET=1 puts the interpreter in place of the compiler"),
]

COMPUTE_CAPABILITY = 90
ALIGNED = [["tt.divisibility", 16]]


def built(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int = 4) -> dict[str, Any]:
    """Every stage of the kernel's code by its name, for argument `types` in order; pointers and strides aligned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert [*types, *constants] == names
    aligned = {(names.index(name),): ALIGNED for name, kind in types.items() if kind != "fp32"}
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", COMPUTE_CAPABILITY, 32), options={"num_warps": warps}).asm


@pytest.mark.parametrize("exact_codes", [True, False], ids=["distances", "products"])
def test_the_scan_cuts_bits_out_of_four_bytes_at_a_time_and_multiplies_them_on_tensor_cores(exact_codes: bool) -> None:
    from longfit.attention.kernels import scan

    numbers = dict.fromkeys(["S", "G", "stride_b", "stride_g", "stride_s", "blocks"], "i32")
    levels = dict.fromkeys(["level_0", "step_low", "step_high", "step_both", "largest_step"], "fp32")
    code = built(
        scan._scan,
        {"queries": "*u8" if exact_codes else "*fp32", "codes": "*u8", "scores": "*fp32", **numbers, **levels},
        {"R": 4, "W": 32, "W_PAD": 32, "ROWS": 16, "EXACT_CODES": exact_codes, "BOTH": exact_codes}
        | {"NATIVE": True, "BLOCK": scan.BLOCK},
    )
    assert code["cubin"]
    assert "and.b32" in code["ptx"] and f"{0x01010101}" in code["ptx"]
    assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in code["ptx"]
    assert "cp.async" in code["ptx"]  # codes are on their way while others are scored


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_to_chosen_entries(heads: int) -> None:
    from longfit.attention.kernels import attend

    tensors = dict.fromkeys(["queries", "keys", "values", "past_keys", "past_values"], "*bf16")
    numbers = ["k", "H", "G", "chosen", "blocks", "key_b", "key_g", "key_s", "value_b", "value_g", "value_s"]
    code = built(
        attend._attend_share,
        tensors
        | {"slots": "*i32", "parts": "*fp32", "part_lses": "*fp32", "scaling": "fp32"}
        | dict.fromkeys(numbers, "i32"),
        {"HEADS": heads, "ROWS": 1 if heads == 1 else 16, "D": 128, "D_PAD": 128, "DV": 128, "DV_PAD": 128}
        | {"BLOCK": attend.BLOCK, "UPCAST": False},
    )
    assert code["cubin"]


def test_the_best_of_a_chunk_and_the_shares_of_a_head() -> None:
    from longfit.attention.kernels import attend, top

    numbers = dict.fromkeys(["S", "k", "most"], "i32")
    pointers = {"scores": "*fp32", "places": "*i32", "best": "*fp32", "chosen": "*i32"}
    constants = {"FIRST": False, "BLOCK": 1024}
    assert built(top._best_of_chunk, pointers | numbers, constants)["cubin"]
    pointers = {"parts": "*fp32", "part_lses": "*fp32", "out": "*bf16", "lse": "*fp32"}
    constants = {"SPLITS_PAD": 16, "DV": 128, "DV_PAD": 128}
    assert built(attend._combine, pointers | {"splits": "i32"}, constants)["cubin"]

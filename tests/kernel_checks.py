"""Checks of the kernels against plain torch, for the interpreter (test_kernels.py) and a GPU (test_kernels_gpu.py).

Run by itself, it prints one JSON object: the check's name and what was wrong, or nothing.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from longfit.attention.kernels import naive
from longfit.cache.side_index import pack_bits

SYMMETRIC, UNEVEN = (-1.51, -0.4528, 0.4528, 1.51), (-3.0, 0.0, 0.2, 1.0)
CODES = {  # B, G, R, S, D
    "one key": (2, 1, 1, 1, 64),
    "three heads, d 60": (2, 2, 3, 63, 60),
    "four heads, d 128": (1, 2, 4, 500, 128),
    "five heads, d 100": (1, 1, 5, 1025, 100),
}
ROWS = {  # shape, k
    "one score": ((2, 3, 1), 1),
    "all of 63": ((2, 63), 63),
    "7 of 500": ((1, 2, 500), 7),
    "128 of 1025": ((2, 1025), 128),
}
HEADS = {  # B, G, R, S, D, Dv, k, shared, dtype
    "the only entry": (1, 1, 1, 1, 64, 64, 1, False, torch.float32),
    "all of 63, three heads": (2, 2, 3, 63, 60, 60, 63, False, torch.float32),
    "all of 63, three heads together": (2, 2, 3, 63, 60, 100, 63, True, torch.float32),
    "128 of 500, bf16": (1, 1, 4, 500, 128, 128, 128, False, torch.bfloat16),
    "128 of 500, bf16, together": (1, 2, 4, 500, 128, 128, 128, True, torch.bfloat16),
    "7 of 1025, fp16, d 100": (2, 2, 1, 1025, 100, 64, 7, False, torch.float16),
}


def error(given: Tensor, expected: Tensor) -> float:
    """Relative root mean square error; NaN where there is one."""
    given, expected = given.double().cpu(), expected.double().cpu()
    return float((given - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30))


def poisoned(entries: Tensor, device: str) -> Tensor:
    """The same entries [B, G, S, ...] as the first S of a larger buffer that otherwise holds NaN, or all bits set."""
    B, G, S = entries.shape[:3]
    nothing = torch.nan if entries.is_floating_point() else 255
    buffer = torch.full((B, G, S + 37, *entries.shape[3:]), nothing, dtype=entries.dtype, device=device)
    buffer[:, :, :S] = entries
    return buffer[:, :, :S]


def scan(shape: tuple[int, ...], device: str) -> None:
    from longfit.attention.kernels import scan as kernel

    B, G, R, S, D = shape
    codes = poisoned(pack_bits(torch.randint(0, 4, (B, G, S, D), dtype=torch.uint8)), device)
    own = pack_bits(torch.randint(0, 4, (B, G, R, D), dtype=torch.uint8)).to(device)
    assert torch.equal(kernel.code_nearness(own, codes), naive.code_nearness(own, codes))
    # A channel far larger than the others, as keys have them, and a head without any signal.
    queries = torch.randn(B, G, R, D, device=device) * torch.tensor([30.0] + [1.0] * (D - 1), device=device)
    queries[0, 0, 0] = 0
    for levels in (SYMMETRIC, UNEVEN):
        exact = naive.code_products(queries.double().float(), codes, levels)
        given = kernel.code_products(queries, codes, levels)
        assert error(given, exact) < 1e-5, error(given, exact)
        assert not given[0, 0, 0].any()


def top(shape: tuple[int, ...], k: int, device: str) -> None:
    from longfit.attention.kernels import top as kernel

    scores = torch.randn(shape, device=device)
    for given in (scores, (2 * scores).round()):  # the second has ties wherever one looks
        chosen = kernel.select_top(given, k)
        assert torch.equal(chosen, naive.select_top(given, k))
        values = given.gather(-1, chosen.long()).sort(-1, descending=True).values
        assert torch.equal(values, given.topk(k).values)


def top_in_rounds(device: str) -> None:
    from longfit.attention.kernels import top as kernel

    chunk, kernel.CHUNK = kernel.CHUNK, 256
    try:
        top((2, 1025), 30, device)
        even = torch.full((1, 700), -torch.inf, device=device)
        assert kernel.select_top(even, 32).tolist() == [list(range(32))]
    finally:
        kernel.CHUNK = chunk


def top_of_special_numbers(device: str) -> None:
    from longfit.attention.kernels import top as kernel

    scores = torch.randn(1, 63, device=device)
    scores[0, 5], scores[0, 9], scores[0, 11] = torch.nan, -torch.nan, torch.inf
    scores[0, 20:30], scores[0, 25], scores[0, 40:] = 0.0, -0.0, -torch.inf
    for k in (2, 3, 20, 50):
        assert torch.equal(kernel.select_top(scores, k), naive.select_top(scores, k)), k


def attend(
    B: int, G: int, R: int, S: int, D: int, Dv: int, k: int, shared: bool, dtype: torch.dtype, device: str
) -> None:
    from longfit.attention.kernels import attend as kernel

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).to(device)

    stored = poisoned(normal(B, G, S, D), device), poisoned(normal(B, G, S, Dv), device)
    slots = torch.rand(B, G if shared else G * R, S).argsort(-1)[..., :k].to(device)
    own = normal(B, G * R, 1, D), normal(B, G, 1, D), normal(B, G, 1, Dv)
    out, lse = kernel.attend_slots(*own, stored, slots.int() if shared else slots, D**-0.5)
    expected, expected_lse = naive.attend_slots(*own, stored, slots, D**-0.5)
    assert out.dtype == dtype and lse.dtype == torch.float32
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert error(out, expected) < limit, error(out, expected)
    assert error(lse, expected_lse) < 1e-5, error(lse, expected_lse)


def attend_passes_over_missing(device: str) -> None:
    from longfit.attention.kernels import attend as kernel

    own = [torch.randn(1, n, 1, 64, device=device) for n in (2, 2, 2)]
    stored = torch.randn(1, 2, 90, 64, device=device), torch.randn(1, 2, 90, 64, device=device)
    slots = torch.full((1, 2, 70), -1, device=device)
    slots[:, :, 50] = 33
    for given, expected in zip(
        kernel.attend_slots(*own, stored, slots, 0.1),
        naive.attend_slots(*own, stored, slots[..., 50:51], 0.1),
        strict=True,
    ):
        assert error(given, expected) < 1e-5


def a_model_decodes(selector: str, names: str, device: str) -> None:
    import longfit
    from longfit.attention.kernels import dispatch
    from tests.tiny import tiny_model

    ids = torch.randint(3, 100, (1, 40), generator=torch.Generator().manual_seed(5)).to(device)
    model = tiny_model("llama").to(device)
    fitted = longfit.wrap(model, attention=selector, top_tokens=7, dense_layers=0)
    logits = {}
    for allowed in (names, "plain"):
        os.environ[dispatch.VARIABLE] = allowed
        assert dispatch.available(device) == (allowed != "plain")
        out = fitted.generate(ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
        logits[allowed] = torch.stack(out.logits)
    del os.environ[dispatch.VARIABLE]
    assert error(logits[names], logits["plain"]) < 1e-4


CHECKS: dict[str, Callable[[str], None]] = {
    **{f"scan: {name}": lambda device, shape=shape: scan(shape, device) for name, shape in CODES.items()},
    **{f"top: {name}": lambda device, row=row: top(*row, device) for name, row in ROWS.items()},
    "top: in rounds": top_in_rounds,
    "top: infinities, NaN, both zeros": top_of_special_numbers,
    **{f"attend: {name}": lambda device, heads=heads: attend(*heads, device) for name, heads in HEADS.items()},
    "attend: slots below zero": attend_passes_over_missing,
    "a model decodes with topk": lambda device: a_model_decodes("topk", "scan,top,attend", device),
    "a model decodes with hadamard_topk": lambda device: a_model_decodes("hadamard_topk", "scan,top,attend", device),
    # Distances have ties, among which torch.topk takes others than the kernel does.
    "a model decodes with adamas": lambda device: a_model_decodes("adamas", "scan,attend", device),
}


def wrong(check: str, device: str) -> str:
    torch.manual_seed(0)
    try:
        CHECKS[check](device)
    except Exception:
        return traceback.format_exc(limit=4)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({check: wrong(check, "cpu") for check in CHECKS}, sys.stdout)
    print()

"""Which path a step takes: a Triton kernel where one can run, compiled C on a CPU that has it, plain torch elsewhere.

The environment variable LONGFIT_KERNELS names the kernels that may be used, of "scan", "top" and "attend" (all three
where it is not set; the C code has the first two); "plain" allows none, for comparison. It is read at every call. With
TRITON_INTERPRET=1 set before Triton is imported, the Triton kernels run in its interpreter on a CPU: slow, and how they
are tested without a GPU.
"""

import contextlib
import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from longfit.attention import code_scan
from longfit.attention.kernels import cpu
from longfit.attention.partial import attend_one, repeat
from longfit.cache import take
from longfit.errors import InputError

VARIABLE = "LONGFIT_KERNELS"
KERNELS = ("scan", "top", "attend")
OLDEST_CAPABILITY = (8, 0)  # the first with bfloat16
LARGEST_HEAD = 256
MOST_QUERY_HEADS = 32  # that one key/value head may have for the scan
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def available(device: torch.device | str, kernel: str | None = None) -> bool:
    """Whether a kernel (any of them if None is named) can run on the device and is allowed to.

    Raises:
        InputError: LONGFIT_KERNELS names something that is not a kernel.
    """
    allowed = _allowed(os.environ.get(VARIABLE))
    return bool(allowed) and (kernel is None or kernel in allowed) and _runs(torch.device(device))


def code_nearness(query_codes: Tensor, codes: Tensor) -> Tensor:
    """Minus the Manhattan distances [B, G, R, S] between 2-bit codes, fp32; see `naive.code_nearness`."""
    if _scans(query_codes, codes):
        from longfit.attention.kernels import scan

        with _on(codes):
            return scan.code_nearness(query_codes, codes)
    return (cpu if _allows("scan") and cpu.scans(codes) else code_scan).code_nearness(query_codes, codes)


def code_products(queries: Tensor, codes: Tensor, levels: tuple[float, float, float, float]) -> Tensor:
    """Dot products [B, G, R, S] of queries with the levels of 2-bit codes, fp32; see `naive.code_products`."""
    if _scans(queries, codes):
        from longfit.attention.kernels import scan

        with _on(codes):
            return scan.code_products(queries, codes, levels)
    return (cpu if _allows("scan") and cpu.scans(codes) else code_scan).code_products(queries, codes, levels)


def select_top(scores: Tensor, k: int) -> Tensor:
    """Places [..., k] of the k highest of scores [..., S], in any order; int32 or int64.

    Among equal scores the kernels take the lowest places; torch.topk, the other path, takes any.
    """
    if scores.dtype in FLOATS and available(scores.device, "top"):
        from longfit.attention.kernels import top

        if top.suits(scores.shape[-1], k):
            with _on(scores):
                return top.select_top(scores, k)
    if _allows("top") and cpu.selects(scores):
        return cpu.select_top(scores, k)
    return scores.topk(k, sorted=False).indices


def attend_slots(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    stored: tuple[Tensor, Tensor],
    slots: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention of one query a head to stored entries and to its own key; see `naive.attend_slots`."""
    fits = max(queries.shape[-1], values.shape[-1]) <= LARGEST_HEAD and queries.dtype in FLOATS
    if fits and available(queries.device, "attend"):
        from longfit.attention.kernels import attend

        with _on(queries):
            return attend.attend_slots(queries, keys, values, stored, slots, scaling)
    return _gather_and_attend(queries, keys, values, stored, slots, scaling)


def _gather_and_attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    stored: tuple[Tensor, Tensor],
    slots: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """The plain path: one gather of what was chosen and one small matrix product."""
    G, chosen = keys.shape[1], slots.shape[1]
    together = slots.reshape(slots.shape[0], G, -1)
    past_keys, past_values = (take(t, together).reshape(*slots.shape, -1) for t in stored)
    own_keys, own_values = repeat(keys, chosen // G), repeat(values, chosen // G)
    return attend_one(queries, own_keys, own_values, (past_keys, past_values), scaling)


def _scans(queries: Tensor, codes: Tensor) -> bool:
    heads, head_bytes = queries.shape[2], codes.shape[-1]
    return 4 * head_bytes <= LARGEST_HEAD and heads <= MOST_QUERY_HEADS and available(codes.device, "scan")


def _allows(kernel: str) -> bool:
    return kernel in _allowed(os.environ.get(VARIABLE))


@cache
def _allowed(names: str | None) -> frozenset[str]:
    if names is None:
        return frozenset(KERNELS)
    chosen = {name.strip() for name in names.split(",") if name.strip()}
    if chosen <= {"plain"}:
        return frozenset()
    if unknown := sorted(chosen - set(KERNELS)):
        raise InputError(
            f"{VARIABLE}={names!r}: there is no kernel {', '.join(unknown)}; "
            f'name some of {", ".join(KERNELS)}, or "plain" for none'
        )
    return frozenset(chosen)


@cache
def _runs(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return (
        device.type == "cuda"
        and torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
    )


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's where a model is spread over several."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

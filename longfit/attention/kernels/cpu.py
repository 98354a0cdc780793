"""The scan of packed codes and the choice of the highest scores on a CPU with AVX-512, in C.

Compiled by the machine's own compiler when it is first needed. One thread does the work.
"""

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from longfit.cache.side_index import unpack_bits
from longfit.folders import cache_folder

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = ("-O3", "-march=native", "-fPIC", "-shared")
COMPILE_SECONDS = 60
CHUNK_BYTES = 16  # what the code takes of a key at a time
LANES = 16

logger = logging.getLogger("longfit")


def scans(codes: Tensor) -> bool:
    """Whether codes [B, G, S, W] can be scanned here; the first call compiles, in about a second."""
    fits = codes.device.type == "cpu" and codes.shape[-1] % CHUNK_BYTES == 0
    return fits and codes.stride(-1) == 1 and codes.stride(-2) == codes.shape[-1] and _library() is not None


def selects(scores: Tensor) -> bool:
    """Whether the highest of the scores can be chosen here."""
    return scores.device.type == "cpu" and scores.dtype == torch.float32 and _library() is not None


def code_nearness(query_codes: Tensor, codes: Tensor) -> Tensor:
    """See `naive.code_nearness`."""
    worth = (unpack_bits(query_codes).unsqueeze(-1) - torch.arange(4.0)).abs_().neg_()
    return _scan(codes, worth)


def code_products(queries: Tensor, codes: Tensor, levels: tuple[float, float, float, float]) -> Tensor:
    """See `naive.code_products`."""
    return _scan(codes, queries.float().unsqueeze(-1) * torch.tensor(levels))


def _scan(codes: Tensor, worth: Tensor) -> Tensor:
    """Scores [B, G, R, S] in fp32: the sum over d of worth[d, code[d]], with worth [B, G, R, D, 4] in fp32."""
    library = _library()
    assert library is not None
    B, G, S, W = codes.shape
    R = worth.shape[2]
    # [B, G, R, 2 W, 16]: the sums of two neighbours, the first one's code in the low bits.
    tables = (worth[..., 0::2, None, :] + worth[..., 1::2, :, None]).flatten(-2).contiguous()
    scores = torch.empty(B, G, R, S)
    for b in range(B):
        for g in range(G):
            head = codes[b, g], tables[b, g], scores[b, g]
            library.longfit_scan(head[0].data_ptr(), S, W, head[1].data_ptr(), R, head[2].data_ptr())
    return scores


def select_top(scores: Tensor, k: int) -> Tensor:
    """Places [..., k] of the k highest of the scores [..., S], ascending; of equal ones the first. NaN is highest."""
    library = _library()
    assert library is not None
    scores, n, rows = scores.contiguous(), scores.shape[-1], scores.shape[:-1]
    work = torch.empty(2 * (n + LANES), dtype=torch.int32)
    chosen = torch.empty(*rows, k, dtype=torch.int64)
    library.longfit_top(scores.data_ptr(), rows.numel(), n, k, work.data_ptr(), chosen.data_ptr())
    return chosen


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled code, or None where there is no compiler or no AVX-512; says so once."""
    if not torch.cpu.get_capabilities().get("avx512_f", False):
        logger.info("no AVX-512 on this machine: 2-bit codes are scanned in plain torch, slower than exact scoring")
        return None
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "2-bit codes are scanned in plain torch, which is slower than exact scoring; for the fast scan a C "
            "compiler is needed (CC, or cc on the path): %s",
            error,
        )
        return None
    long, pointer = ctypes.c_long, ctypes.c_void_p
    library.longfit_scan.argtypes = [pointer, long, long, pointer, long, pointer]
    library.longfit_top.argtypes = [pointer, long, long, long, pointer, pointer]
    library.longfit_scan.restype = library.longfit_top.restype = None
    return library


def _compiled() -> Path:
    """The shared library in the cache folder: one for each version of the source and kind of processor."""
    written = SOURCE.read_bytes()
    processor = f"{platform.machine()} {sorted(torch.cpu.get_capabilities().items())}"
    name = hashlib.sha256(written + processor.encode()).hexdigest()[:16]
    target = cache_folder() / "native" / f"cpu-{name}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            command = [os.environ.get("CC", "cc"), *FLAGS, "-o", str(made), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)
            made.replace(target)  # at once: another process may be doing the same
    return target

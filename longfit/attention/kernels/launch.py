"""What the launching side of every kernel needs to know of its device."""

from functools import cache

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
NATIVE = not INTERPRETED  # whether kernels may hold PTX instructions
INTERPRETER_PROGRAMS = 2  # stands for multiprocessors: small, so that loops of several blocks are run too


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; a few in Triton's interpreter."""
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count

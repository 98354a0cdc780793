"""Peak memory of a stretch of work, as the operating system or the GPU saw it."""

import contextlib
import resource
import sys
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMeter:
    """Peak memory above the start, in bytes.

    On a GPU, what torch allocated. On Linux, the process's peak resident size: the kernel's high-water mark is reset at
    the start where that is allowed. Memory that the process had freed but not given back counts as already there, so
    only the first run of a fresh process shows the whole peak. Elsewhere the process's lifetime peak is all there is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
            return
        with contextlib.suppress(OSError):
            CLEAR.write_text("5")
        self.start = _status("VmRSS")

    def peak_bytes(self) -> int:
        """Bytes by which memory rose at most since the meter was made."""
        if self.device.type == "cuda":
            return max(0, torch.cuda.max_memory_allocated(self.device) - self.start)
        return max(0, _status("VmHWM") - self.start)


def _status(field: str) -> int:
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)

"""Where a slow tier's pages lie: a file on a machine without a GPU, pinned host memory beside one, a saved memory."""

import contextlib
import mmap
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from longfit.errors import OffloadError


class Pages(Protocol):
    """Pages that can be read."""

    def read(self, place: int, skip: int, into: Tensor) -> None:
        """Fill `into` (contiguous) from the page at `place`, leaving out its first `skip` numbers."""

    def wait(self) -> None:
        """Let what comes next on this thread see what was read."""


class Shelf(Pages, Protocol):
    """Append-only storage of pages. A deep copy is an empty shelf of the same kind: pages already written never change,
    so copies of a cache go on reading them where they lie and write what comes after to shelves of their own."""

    def write(self, pages: Tensor) -> int:
        """Store `pages` (any shape, contiguous); returns their place."""


class FilePages:
    """Pages in a file, read through a mapping. Mapped pages count as the process's resident memory, so they are given
    back after each step; what the system keeps of the file in its page cache is its own and is reclaimed when memory is
    short.

    Args:
        file: open for reading; None as long as there is none.
        nbytes: of the file.
    """

    def __init__(self, file: Any = None, nbytes: int = 0) -> None:
        self.nbytes = nbytes
        self._file: Any = file
        self._map: Any = None

    def read(self, place: int, skip: int, into: Tensor) -> None:
        start = place + skip * into.element_size()
        stop = start + into.nbytes
        if self._map is None or len(self._map) < stop:
            self._map = mmap.mmap(self._file.fileno(), self.nbytes, access=mmap.ACCESS_READ)
        target = into if into.device.type == "cpu" else torch.empty_like(into, device="cpu")
        bytes_of(target)[:] = memoryview(self._map)[start:stop]
        if target is not into:
            into.copy_(target)

    def wait(self) -> None:
        """Everything was read at once; the mapped pages go back."""
        # All of them: around what is touched the kernel maps neighbours.
        if self._map is not None and hasattr(self._map, "madvise"):
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_DONTNEED)


class SavedPages(FilePages):
    """The pages of a memory that was saved: nothing is written to them, and copies share them.

    Args:
        path: their file; it may be deleted while it is read.
    """

    def __init__(self, path: Path) -> None:
        file = path.open("rb")
        super().__init__(file, path.stat().st_size)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SavedPages":
        return self


class SlowFile(FilePages):
    """Pages in a temporary file that has no name: it is gone with the last cache that reads it, even after a crash.

    Written with plain writes, so that a full disk is an error here (a write into a mapping would be a bus error).

    Args:
        folder: where the file is made; the system's temporary folder by default. In a folder that is a RAM disk
            (`tmpfs`) the slow tier takes memory.

    Raises:
        OffloadError: the folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        self.folder = folder

    def write(self, pages: Tensor) -> int:
        place, rest = self.nbytes, memoryview(bytes_of(pages.cpu()))
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, prefix="longfit-", buffering=0)  # noqa: SIM115
            self._file.seek(place)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as failure:
            raise OffloadError(
                f"the slow tier could not write {pages.nbytes:,} bytes behind {place:,} others in "
                f"{self.folder or tempfile.gettempdir()}: {failure.strerror or failure}; give a folder with room for "
                "the whole input's keys and values as `folder`"
            ) from failure
        self.nbytes += pages.nbytes
        return place

    def __deepcopy__(self, memo: dict[int, Any]) -> "SlowFile":
        memo[id(self)] = new = SlowFile(self.folder)
        return new


class PinnedMemory:
    """Pages in pinned host memory, copied to the GPU on a stream of their own while the model computes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.nbytes = device, 0
        self.pages: list[Tensor] = []
        self.stream = torch.cuda.Stream(device)

    def write(self, pages: Tensor) -> int:
        flat = pages.reshape(-1)
        held = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        held.copy_(flat)
        self.pages.append(held)
        self.nbytes += held.nbytes
        return len(self.pages) - 1

    def read(self, place: int, skip: int, into: Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            into.view(-1).copy_(self.pages[place][skip : skip + into.numel()], non_blocking=True)
        into.record_stream(self.stream)

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PinnedMemory":
        memo[id(self)] = new = PinnedMemory(self.device)
        return new


def shelf_for(device: torch.device, folder: str | None) -> Shelf:
    """The slow side of a cache on `device`."""
    return PinnedMemory(device) if device.type == "cuda" and folder is None else SlowFile(folder)


def bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous CPU tensor as a writable buffer of bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()

"""The file of a memory's pages on the slow tier, written page by page: a memory larger than RAM can be saved."""

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor

from longfit.cache import bytes_of


class PageFile:
    """A file that is made with its first page.

    Attributes:
        nbytes: written so far.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.nbytes = path, 0
        self._hash = hashlib.sha256()
        self._file: Any = None

    def write(self, page: Tensor) -> int:
        """Write `page` (contiguous) behind the others; returns its place in bytes.

        Raises:
            OSError: it cannot be written.
        """
        place, given = self.nbytes, memoryview(bytes_of(page.cpu()))
        if self._file is None:
            self._file = self.path.open("wb")
        self._file.write(given)
        self._hash.update(given)
        self.nbytes += page.nbytes
        return place

    def close(self) -> str | None:
        """The hash of what was written; None where there was nothing."""
        if self._file is None:
            return None
        self._file.close()
        return self._hash.hexdigest()

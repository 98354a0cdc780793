"""What was kept, packed for a page: the text in cells, one for each token, and a byte for each cell and layer."""

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longfit.docqa.document import Document
from longfit.docqa.kept import Integers, Kept


def picture(kept: Kept, documents: Sequence[Document]) -> str:
    """One JSON object:

    - `documents`: of each its `name`, `text`, `pages` ([number, start, end]) and `lengths`, which cut the text into
      cells. All lengths and places count as JavaScript does, in UTF-16 units.
    - `layers`: place of each full-attention layer among the model's layers.
    - `map`: base64 of zlib of bytes [1 + L, cells]: per cent of heads that kept the cell's tokens, the mean over layers
      first; cells of all documents one after the other.
    - `share`: [1 + L] the mean of each row over all tokens, in per cent.
    """
    shown, columns = [], []
    for number, document in enumerate(documents):
        starts, rows = cells(kept, number)
        units = _units(document.text)
        lengths = np.diff(units[np.append(starts, len(document.text))]) if len(starts) else np.zeros(0, np.int64)
        shown.append(
            {
                "name": document.name,
                "text": document.text,
                "pages": [[page.number, int(units[page.start]), int(units[page.end])] for page in document.pages],
                "lengths": lengths.tolist(),
            }
        )
        columns.append(rows)
    levels = np.concatenate(columns, 1).round().astype(np.uint8)
    share = [float(kept.share.mean()), *(float(row.mean()) for row in kept.shares)]
    given: dict[str, Any] = {
        "documents": shown,
        "layers": list(kept.layers),
        "map": base64.b64encode(zlib.compress(levels.tobytes(), 9)).decode("ascii"),
        "share": [round(100 * value, 2) for value in share],
    }
    return json.dumps(given, separators=(",", ":"))


def cells(kept: Kept, document: int) -> tuple[Integers, NDArray[np.float32]]:
    """A document cut where its tokens begin, whole from its first character to its last.

    Returns where each of the C cells starts, and per cent [1 + L, C], the mean over layers first. Tokens that share
    their characters (bytes of one letter, say) are one cell.
    """
    own = kept.spans[:, 0] == document
    starts, cell_of = np.unique(kept.spans[own, 1], return_inverse=True)
    rows = np.concatenate([kept.share[None, own], kept.shares[:, own]])
    counts = np.bincount(cell_of, minlength=len(starts)).clip(1)
    means = np.stack([np.bincount(cell_of, weights=row, minlength=len(starts)) / counts for row in rows])
    if len(starts):
        starts[0] = 0
    return starts, (100 * means).astype(np.float32)


def _units(text: str) -> Integers:
    """[characters + 1] UTF-16 units before each character, and in all."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return np.concatenate([[0], np.cumsum(1 + (points > 0xFFFF), dtype=np.int64)])

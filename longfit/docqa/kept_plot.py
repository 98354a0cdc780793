"""What was kept, as a picture: layers by position, and the text as it lies on a page, too small to read."""

import io
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from longfit.docqa.document import Document
from longfit.docqa.kept import Kept
from longfit.docqa.kept_picture import cells
from longfit.eval.report.figure import new_figure, style

LINE_CHARACTERS, GAP_CHARACTERS = 90, 6
WIDTH_TO_HEIGHT = 1.7
CHARACTER_HEIGHT = 2.2  # of its width, with the space between lines
BINS = 200
DROPPED, KEPT = "#dcd8cf", "#c77700"


def png(kept: Kept, documents: Sequence[Document], title: str, facts: Sequence[str]) -> bytes:
    """The picture, byte-identical for the same data.

    Raises:
        InputError: matplotlib is not installed.
    """
    with style():
        from matplotlib.colors import LinearSegmentedColormap

        colours = LinearSegmentedColormap.from_list("kept", [DROPPED, KEPT]).with_extremes(bad="white")
        look = {"cmap": colours, "vmin": 0, "vmax": 100, "aspect": "auto"}
        figure = new_figure(10, 7.5)
        above, below = figure.subplots(2, 1, height_ratios=[1, 3.2])
        layers = by_position(kept)
        image = above.imshow(layers, interpolation="nearest", extent=(0, 100, len(layers) - 0.5, -0.5), **look)
        above.set_xlabel("position in the context, %")
        above.set_ylabel("layer")
        above.set_yticks(range(0, len(layers), max(1, len(layers) // 6)))
        above.set_yticklabels([str(kept.layers[n]) for n in above.get_yticks().astype(int)])
        below.imshow(_leaded(as_page(kept, documents)), interpolation="auto", interpolation_stage="rgba", **look)
        below.set_axis_off()
        figure.suptitle(f"What was kept of {_short(title)}", x=0.01, ha="left", fontsize=11)
        above.set_title(_short(", ".join(facts[:3]), 150), loc="left")
        below.set_title("the text, each letter by the mean over layers", loc="left")
        figure.colorbar(image, ax=[above, below], label="kept, % of heads", shrink=0.6, aspect=35)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
        return file.getvalue()


def by_position(kept: Kept) -> NDArray[np.float64]:
    """[L, bins] per cent of heads that kept the tokens of a bin."""
    tokens = kept.shares.shape[1]
    edges = np.linspace(0, tokens, min(BINS, tokens) + 1).astype(int)
    return 100 * np.add.reduceat(kept.shares, edges[:-1], axis=1) / np.diff(edges)


def as_page(kept: Kept, documents: Sequence[Document]) -> NDArray[np.float32]:
    """[lines, characters] per cent of layers and heads, NaN where there is no letter; in columns like a newspaper's."""
    lines = [line for number, document in enumerate(documents) for line in _lines(kept, number, document.text)]
    width = LINE_CHARACTERS + GAP_CHARACTERS
    columns = max(1, round(math.sqrt(len(lines) * CHARACTER_HEIGHT * WIDTH_TO_HEIGHT / width)))
    height = max(1, math.ceil(len(lines) / columns))
    page = np.full((height, columns * width - GAP_CHARACTERS), np.nan, dtype=np.float32)
    for number, line in enumerate(lines):
        column, row = divmod(number, height)
        page[row, column * width : column * width + len(line)] = line
    return page


def _lines(kept: Kept, number: int, text: str) -> Iterator[NDArray[np.float32]]:
    """The shares of a document's characters, cut into lines at the ends of lines and where a line is full."""
    starts, rows = cells(kept, number)
    shares = np.repeat(rows[0], np.diff(np.append(starts, len(text)))).astype(np.float32)
    shares[[character.isspace() for character in text]] = np.nan
    at = 0
    for line in text.split("\n"):
        for start in range(at, max(at + 1, at + len(line)), LINE_CHARACTERS):
            yield shares[start : min(start + LINE_CHARACTERS, at + len(line))]
        at += len(line) + 1


def _leaded(page: NDArray[np.float32]) -> NDArray[np.float32]:
    """The page with room between its lines: as much as half of a line."""
    height, width = page.shape
    spaced = np.full((height, 3, width), np.nan, dtype=np.float32)
    spaced[:, :2] = page[:, None]
    return spaced.reshape(3 * height, width)


def _short(text: str, most: int = 90) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"

"""The look that all plots share, without matplotlib's global state: colours by method, grids of panels, saving."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longfit.errors import InputError
from longfit.eval.report.document import Picture
from longfit.eval.report.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colour-blind-safe colours without yellow and black, and one more (Tol's wine).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
MARKERS = "osD^vP*X"
SEQUENTIAL = "cividis"
FADED, INK = "#c8c8c8", "#222222"
BASELINE_LINES: dict[str, dict[str, Any]] = {
    "full": {"color": INK, "linestyle": "-", "linewidth": 1.2},
    "truncate": {"color": "#555555", "linestyle": "--", "linewidth": 1.2},
    "no_context": {"color": "#555555", "linestyle": ":", "linewidth": 1.2},
}
_STYLE: Any = {
    "svg.hashsalt": "longfit",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Plot:
    picture: Picture
    figure: "Figure"


@contextmanager
def style() -> Iterator[None]:
    """Draw and save inside it.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError('plots need matplotlib; install it with: pip install "longfit[eval]"') from error
    with matplotlib.rc_context(_STYLE):
        yield


def colours(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker a method, the pair different for each of the first 56."""
    return {name: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(methods)}


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that many inches, drawn by Agg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def grid(
    count: int, columns: int, width: float, height: float, *, sharex: bool = True, sharey: bool = True
) -> tuple["Figure", list["Axes"]]:
    """``count`` panels of ``width`` x ``height`` inches, at most ``columns`` in a row, and nothing in the gaps."""
    columns = min(columns, count)
    lines = math.ceil(count / columns)
    figure = new_figure(max(3.2, width * columns), height * lines + 0.5)
    axes = figure.subplots(lines, columns, sharex=sharex, sharey=sharey, squeeze=False)
    used = list(axes.flat)
    for spare in used[count:]:
        spare.remove()
    for panel in used[max(0, count - columns) : count]:
        panel.tick_params(labelbottom=True)
    return figure, used[:count]


def marker_legend(figure: "Figure", entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """A legend of lines above the panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **look) for label, look in entries]
    width = figure.get_size_inches()[0]
    figure.legend(handles=handles, loc="outside upper center", ncols=max(1, min(len(handles), int(width / 1.5))))


def save(plot: Plot, folder: Path) -> list[Path]:
    """``plots/<name>.png`` at 160 dots an inch and ``plots/<name>.svg``, byte-identical for the same data."""
    written = []
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        nothing = {"Software": None} if kind == "png" else dict.fromkeys(("Date", "Creator", "Format", "Type"))
        plot.figure.savefig(buffer, format=kind, dpi=160, metadata=nothing)
        written.append(write_atomically(folder / "plots" / f"{plot.picture.name}.{kind}", buffer.getvalue()))
    return written

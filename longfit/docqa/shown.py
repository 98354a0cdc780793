"""Citations as text for a terminal, and the progress of a prefill."""

import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from longfit.docqa.citations import Citation

MOST_QUOTED = 300
WIDTH = 100


def citations_text(citations: Sequence[Citation]) -> str:
    """One paragraph for each citation: where it is, whether the answer stands there, and its words."""
    if not citations:
        return "no passage of the documents shares a word with this answer"
    return "\n".join(_one(number, citation) for number, citation in enumerate(citations, 1))


def _one(number: int, citation: Citation) -> str:
    page = "" if citation.page is None else f", page {citation.page}"
    found = "verified" if citation.verified else "not found"
    kept = "" if citation.kept is None else f"; {100 * citation.kept:.0f} % kept"
    quote = textwrap.shorten(citation.quote, MOST_QUOTED, placeholder=" ...")
    lines = textwrap.fill(f'"{quote}"', WIDTH, initial_indent="    ", subsequent_indent="    ")
    return f"[{number}] {citation.document}{page}: {found}{kept}\n{lines}"


@contextmanager
def progress_bar(model: Any, shown: bool = True) -> Iterator[None]:
    """Inside, a bar on stderr follows what a wrapped model reads, where stderr is a terminal."""
    if not shown or not sys.stderr.isatty():
        yield
        return
    bar = tqdm(desc="reading", unit=" tokens", unit_scale=True, leave=False, file=sys.stderr)

    def moved(read: int, total: int) -> None:
        bar.total = total
        bar.update(read - bar.n)
        if read >= total:
            bar.refresh()

    with bar, model.longfit.observed(moved):
        yield

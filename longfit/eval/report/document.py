"""What a report says, before it is Markdown or HTML: a list of blocks. ``**bold**`` is the only markup in a text."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    text: str
    level: int


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Listing:
    """Names with their values."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """``rows`` of as many texts as ``columns``; the first ``left`` columns are words, the others numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """The plot ``plots/<name>.png`` and ``.svg``."""

    name: str
    title: str
    caption: str


Block = Heading | Text | Listing | Table | Picture


@dataclass(frozen=True)
class Report:
    """A written report: its Markdown, and every file that was written."""

    markdown: str
    files: list[Path]

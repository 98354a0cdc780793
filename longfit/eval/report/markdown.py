"""Blocks as GitHub-flavoured Markdown."""

from collections.abc import Iterable

from longfit.eval.report.document import Block, Heading, Listing, Picture, Table, Text


def render(blocks: Iterable[Block]) -> str:
    """The whole document, with one blank line between blocks."""
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Listing(items):
            return "\n".join(f"- **{name}**: {value}" for name, value in items)
        case Picture(name, title, caption):
            return f"![{title}](plots/{name}.png)\n\n*{title}.* {caption}"
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    numbers = len(table.columns) - table.left
    lines = [_line(table.columns), "|" + "---|" * table.left + "--:|" * numbers]
    lines += [_line(row) for row in table.rows]
    return (f"{table.caption}\n\n" if table.caption else "") + "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

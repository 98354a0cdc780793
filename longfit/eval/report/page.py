"""Blocks as one HTML page that needs nothing else: its style and its plots are inside."""

import html
import re
from collections.abc import Iterable
from pathlib import Path

from longfit.eval.report.document import Block, Heading, Listing, Picture, Table, Text

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #d5d5d5; --soft: #f3f4f6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181c; --line: #3a3e45; --soft: #22252b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem; } h1 { margin-top: .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .88rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; max-width: 60rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; text-align: right; }
th { background: var(--soft); } .word { text-align: left; }
tbody tr:hover { background: var(--soft); }
figure { margin: 1.2rem 0; } figcaption { font-size: .85rem; margin-top: .4rem; }
.plot { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .4rem; overflow-x: auto; }
.plot svg { display: block; width: 100%; min-width: 36rem; max-width: 64rem; height: auto; margin: 0 auto;
  font-family: "DejaVu Sans", Verdana, Arial, sans-serif; }
"""


def render(title: str, blocks: Iterable[Block], folder: Path) -> str:
    """The page; plots are read from ``folder``/plots."""
    body = "\n".join(_block(block, folder) for block in blocks)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}<title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _block(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Listing(items):
            pairs = "".join(f"<dt>{_inline(name)}</dt><dd>{_inline(value)}</dd>" for name, value in items)
            return f"<dl>{pairs}</dl>"
        case Table():
            return _table(block)
        case Picture(name, title, caption):
            svg = inline_svg((folder / "plots" / f"{name}.svg").read_text(encoding="utf-8"), name, title)
            words = f"<strong>{_inline(title)}.</strong> {_inline(caption)}"
            return f'<figure><div class="plot">{svg}</div><figcaption>{words}</figcaption></figure>'


def _inline(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))


def _table(table: Table) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        marks = ((f'<{tag} class="word">' if i < table.left else f"<{tag}>", cell) for i, cell in enumerate(cells))
        return "<tr>" + "".join(f"{mark}{_inline(cell)}</{tag}>" for mark, cell in marks) + "</tr>"

    caption = f"<caption>{_inline(table.caption)}</caption>" if table.caption else ""
    body = "\n".join(line(row, "td") for row in table.rows)
    head = f"<thead>{line(table.columns, 'th')}</thead>"
    return f'<div class="wide"><table>{caption}{head}\n<tbody>\n{body}\n</tbody></table></div>'


def inline_svg(text: str, prefix: str, title: str) -> str:
    """An SVG file as an element of a page: no prolog or metadata, ids that cannot meet another plot's."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # In HTML the parser knows both namespaces; without their addresses the page names nothing outside itself.
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1).strip()

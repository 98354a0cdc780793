"""What a saved memory kept of its text, as one HTML file that needs nothing else and one PNG. No model is loaded."""

import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from longfit.docqa.kept import Kept, kept_on_disk, no_text, spans_of
from longfit.docqa.kept_picture import picture
from longfit.docqa.kept_plot import png
from longfit.docqa.source import Source
from longfit.errors import MemoryFileError
from longfit.eval.report.files import write_atomically
from longfit.memory_file import described, information, source_of
from longfit.units import format_bytes

_STYLE = """
body { max-width: 60rem; margin: 0 auto; padding: 1rem 1.25rem 2rem; }
h1 { margin: 0 0 .25rem; font-size: 1.3rem; overflow-wrap: anywhere; }
.facts { margin: 0 0 1.25rem; color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.kept-text { height: calc(100vh - 14rem); min-height: 20rem; }
.legend { margin-bottom: .6rem; }
"""
_SCRIPT = """
const picture = await unpack(JSON.parse(document.getElementById("data").textContent));
const text = new KeptText(document.getElementById("kept"), picture);
const [layer, name] = [document.getElementById("layer"), document.getElementById("layer-name")];
const show = () => {
  text.setLayer(Number(layer.value));
  name.textContent = layerName(picture, Number(layer.value));
  layer.setAttribute("aria-valuetext", name.textContent);
};
layer.max = picture.layers.length;
layer.addEventListener("input", show);
show();
"""


def report(memory: Path, output: Path) -> list[Path]:
    """Write `NAME.kept.html` and `NAME.kept.png` for the memory in folder NAME.

    Raises:
        MemoryFileError: no memory there, or one that cannot be read.
        InputError: it does not know its text or where its tokens are; matplotlib is not installed.
        UnsupportedFeatureError: what `kept_on_disk` refuses.
    """
    memory = memory.resolve()
    facts = information(memory)
    read = source_of(memory, facts)
    if read is None:
        raise MemoryFileError(f"{memory} does not know the text that it was made from; make it with `longfit compress`")
    source = Source.from_dict(read)
    spans = spans_of(source)
    held = kept_on_disk(memory, np.concatenate([spans, no_text(facts["tokens_in"] - len(spans))]))
    title = ", ".join(document.name for document in source.documents)
    said = _said(described(facts, memory), held)
    image = png(held, source.documents, title, said)
    return [
        write_atomically(output / f"{memory.stem}.kept.html", page(held, source, title, said)),
        write_atomically(output / f"{memory.stem}.kept.png", image),
    ]


def page(held: Kept, source: Source, title: str, facts: Sequence[str]) -> str:
    """The HTML file."""
    styles, script = _part("kept.css") + _STYLE, _part("kept.js") + _SCRIPT
    data = picture(held, source.documents).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>What was kept of {html.escape(title)}</title>\n<style>\n{styles}</style>\n</head>\n<body>\n"
        f'<h1 id="title">What was kept of {html.escape(title)}</h1>\n'
        f'<p class="facts">{html.escape(" · ".join(facts))}</p>\n'
        '<div class="layers"><label for="layer">Layers</label><output id="layer-name" for="layer"></output>'
        '<input type="range" id="layer" min="0" max="0" step="1" value="0"></div>\n'
        '<p class="legend">dropped <i class="k0"></i><i class="k1"></i><i class="k3"></i><i class="k5"></i>'
        '<i class="k8"></i> kept by every head</p>\n'
        '<div id="kept" class="kept-text" tabindex="0" role="region" aria-labelledby="title"></div>\n'
        f'<script type="application/json" id="data">{data}</script>\n<script type="module">\n{script}</script>\n'
        "</body>\n</html>\n"
    )


def _said(facts: dict[str, object], held: Kept) -> list[str]:
    """What was kept and by what, for people."""
    said = [
        f"{facts['tokens_in']:,} tokens",
        f"{100 * held.share.mean():.1f} % of them kept, the mean over {len(held.layers)} layers",
    ]
    if isinstance(facts.get("kv_bytes"), int):
        said.append(format_bytes(int(str(facts["kv_bytes"]))))
    return [
        *said,
        *(str(facts[name]) for name in ("learned compressor", "method", "attention", "model") if name in facts),
    ]


def _part(name: str) -> str:
    return (files("longfit.docqa") / "page" / name).read_text(encoding="utf-8")

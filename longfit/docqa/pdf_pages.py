"""The text of each page of a PDF, by PDFium. Run as a script, in a process of its own: see pdf.py.

    python pdf_pages.py MOST_CHARACTERS < file.pdf

writes {"pages": [text, ...]}, or {"problem": what PDFium says, "password": whether it wants one}, or {"characters": so
many} of a text that is too long. It imports nothing of longfit, so that it starts at once.
"""

import json
import re
import sys
from contextlib import suppress
from typing import Any

MOST_MEMORY = 4 << 30
# A word that was divided at the end of a line: PDFium puts this mark in place of hyphen and line end.
DIVIDED = "\x02"
# The dots that lead to a page number in a table of contents: each would be a token.
LEADERS = re.compile(r"(?:[ \u00a0]?\.){5,}")


def pages(data: bytes, most: int) -> dict[str, Any]:
    """What is written."""
    import pypdfium2

    found: list[str] = []
    characters = 0
    try:
        # Not closed: the process ends.
        for page in pypdfium2.PdfDocument(data):
            found.append(clean(page.get_textpage().get_text_bounded()))
            page.close()
            characters += len(found[-1])
            if characters > most:
                return {"characters": characters}
    except pypdfium2.PdfiumError as error:
        return {"problem": str(error), "password": error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD}
    return {"pages": found}


def clean(text: str) -> str:
    """Without divided words and lines of dots, and with line ends as everywhere."""
    return LEADERS.sub(" ...", text.replace(DIVIDED, "").replace("\r\n", "\n").replace("\0", "")).strip()


def limit_memory() -> None:
    """A file that would unpack to more is damaged, as far as we are concerned."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))


if __name__ == "__main__":
    limit_memory()
    json.dump(pages(sys.stdin.buffer.read(), int(sys.argv[1])), sys.stdout)

"""PDF files, page by page, with PDFium."""

import json
import subprocess
import sys
from pathlib import Path

from longfit.docqa.document import Document, Page
from longfit.docqa.extra import needed
from longfit.docqa.text import MOST_TEXT_BYTES, too_long
from longfit.errors import InputError

BETWEEN_PAGES = "\n\n"
READER = Path(__file__).with_name("pdf_pages.py")
# What the longest text that is read takes on a slow machine, several times over.
MOST_SECONDS = 300


def pdf_document(data: bytes, name: str) -> Document:
    """The text of a PDF and where its pages are in it. A page without text is an empty stretch.

    PDFium is not Python, and files come from anywhere: it works in a process of its own, which a hostile file may
    break, fill or hold up without harm to this one.

    Raises:
        InputError: damaged, protected by a password, too long, or without any text (scanned).
        MissingPackageError: pypdfium2 is not installed.
    """
    needed("pypdfium2", "reading a PDF file")
    texts = _page_texts(data, name)
    if not any(texts):
        raise InputError(
            f"{name} is a PDF of {len(texts)} pages without any text: pictures of pages, it seems; make it searchable "
            "first, for example with ocrmypdf"
        )
    return _joined(name, texts)


def _page_texts(data: bytes, name: str) -> list[str]:
    # -P: the script's folder is full of modules whose names others may mean.
    command = [sys.executable, "-P", str(READER), str(MOST_TEXT_BYTES)]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=MOST_SECONDS, check=False)
        given = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise _damaged(name, f"it was not read within {MOST_SECONDS} s") from error
    except ValueError as error:
        told = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise _damaged(name, told[-1] if told else f"its reader ended with {done.returncode}") from error
    if "characters" in given:
        raise too_long(name, given["characters"])
    if given.get("password"):
        raise InputError(
            f"{name} is a PDF protected by a password; save it without one first, for example with "
            "qpdf --decrypt --password=... in.pdf out.pdf"
        )
    if "problem" in given:
        raise _damaged(name, given["problem"])
    # A file can name half a character, which no tokenizer takes.
    return [text.encode("utf-8", "replace").decode("utf-8") for text in given["pages"]]


def _damaged(name: str, why: str) -> InputError:
    return InputError(f"{name} is a damaged PDF file: {why}; open it and save it anew")


def _joined(name: str, texts: list[str]) -> Document:
    pages, text = [], ""
    for number, page in enumerate(texts, 1):
        if page and text:
            text += BETWEEN_PAGES
        pages.append(Page(number, len(text), len(text) + len(page)))
        text += page
    return Document(name, text, tuple(pages))

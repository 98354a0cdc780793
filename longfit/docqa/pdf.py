"""PDF files, page by page, with pypdf."""

import io
from typing import Any

from longfit.docqa.document import Document, Page
from longfit.docqa.extra import needed
from longfit.errors import InputError, LongfitError

BETWEEN_PAGES = "\n\n"


def pdf_document(data: bytes, name: str) -> Document:
    """The text of a PDF and where its pages are in it. A page without text is an empty stretch.

    Raises:
        InputError: damaged, protected by a password, or without any text (scanned).
        MissingPackageError: pypdf is not installed.
    """
    pypdf = needed("pypdf", "reading a PDF file")
    try:
        texts = [_page_text(page) for page in _pages(pypdf, data, name)]
    except LongfitError:
        raise
    except pypdf.errors.DependencyError as error:
        raise InputError(f"{name} is an encrypted PDF, and its cipher cannot be read here: {error}") from error
    except Exception as error:  # a damaged file ends in any error at all inside the parser
        raise InputError(
            f"{name} is a damaged PDF file: {error or type(error).__name__}; open it and save it anew"
        ) from error
    if not any(texts):
        raise InputError(
            f"{name} is a PDF of {len(texts)} pages without any text: pictures of pages, it seems; make it searchable "
            "first, for example with ocrmypdf"
        )
    return _joined(name, texts)


def _pages(pypdf: Any, data: bytes, name: str) -> Any:
    reader = pypdf.PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):
        raise InputError(
            f"{name} is a PDF protected by a password; save it without one first, for example with "
            "qpdf --decrypt --password=... in.pdf out.pdf"
        )
    return reader.pages


def _page_text(page: Any) -> str:
    # A file can name half a character, which no tokenizer takes.
    return str(page.extract_text()).encode("utf-8", "replace").decode("utf-8").replace("\0", "").strip()


def _joined(name: str, texts: list[str]) -> Document:
    pages, text = [], ""
    for number, page in enumerate(texts, 1):
        if page and text:
            text += BETWEEN_PAGES
        pages.append(Page(number, len(text), len(text) + len(page)))
        text += page
    return Document(name, text, tuple(pages))

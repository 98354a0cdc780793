"""Reading documents from files, uploads and standard input; the format is told from the bytes, then from the name."""

import io
import re
import zipfile
from pathlib import Path

from longfit.docqa.document import Document
from longfit.docqa.markup import docx_text, html_text
from longfit.docqa.pdf import pdf_document
from longfit.docqa.text import MOST_TEXT_BYTES, STANDARD_INPUT, decode, read_bytes, too_long

PDF, ZIP = b"%PDF-", b"PK\x03\x04"
HTML_NAMES = (".html", ".htm", ".xhtml")
HTML_START = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html)\b", re.I | re.S
)

DOCX_PART = "word/document.xml"


def read_document(path: str | Path) -> Document:
    """The document in a file: plain text, Markdown, HTML, DOCX or PDF; "-" is standard input.

    Raises:
        InputError: no such file (near names are suggested), a folder, unreadable, or what `document_of` refuses.
        MissingPackageError: the format needs the extra `documents`.
    """
    data = read_bytes(path)
    return document_of(data, "standard input" if str(path) == STANDARD_INPUT else Path(path).name)


def document_of(data: bytes, name: str) -> Document:
    """The document in the bytes of a file called `name`, which is never opened.

    Raises:
        InputError: empty, damaged, protected, scanned, too long, or of a format that is not read.
        MissingPackageError: the format needs the extra `documents`.
    """
    if PDF in data[:1024]:
        document = pdf_document(data, name)
    elif data.startswith(ZIP) and _holds_docx(data):
        document = Document(name, docx_text(data, name))
    elif name.lower().endswith(HTML_NAMES) or HTML_START.match(data[:4096]):
        document = Document(name, html_text(data, name))
    else:
        document = Document(name, decode(data, name).replace("\r\n", "\n").strip())
    if len(document.text) > MOST_TEXT_BYTES:
        raise too_long(name, len(document.text))
    return document


def _holds_docx(data: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return DOCX_PART in archive.namelist()
    except zipfile.BadZipFile:
        return DOCX_PART.encode() in data  # cut off, and refused as damaged

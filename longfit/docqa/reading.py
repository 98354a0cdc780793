"""Reading documents from files, uploads and standard input."""

import sys
from pathlib import Path

from longfit.docqa.document import Document
from longfit.docqa.text import STANDARD_INPUT, decode, read_bytes


def read_document(path: str | Path) -> Document:
    """The document in a file; "-" is standard input.

    Raises:
        InputError: no such file (near names are suggested), a folder, unreadable, or what `document_of` refuses.
    """
    if str(path) == STANDARD_INPUT:
        return document_of(sys.stdin.buffer.read(), "standard input")
    path = Path(path).expanduser()
    return document_of(read_bytes(path), path.name)


def document_of(data: bytes, name: str) -> Document:
    """The document in the bytes of a file called `name`, which is never opened.

    Raises:
        InputError: empty, damaged, or of a format that is not read.
    """
    return Document(name, decode(data, name).strip())

"""Reading a document as text, with a refusal that names the reason."""

import difflib
import sys
from pathlib import Path

from longfit.errors import InputError

STANDARD_INPUT = "-"
# What a file of this kind begins with -> what it is called.
SIGNATURES: dict[bytes, str] = {
    b"%PDF-": "a PDF file",
    b"PK\x03\x04": "a ZIP archive (DOCX, ODT and EPUB files are such archives)",
    b"\xd0\xcf\x11\xe0": "an old Office file (DOC, XLS or PPT)",
    b"{\\rtf": "an RTF file",
    b"\x1f\x8b": "a gzip archive",
}
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
REMEDY = "save or export it as plain text in UTF-8"


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, a byte order mark left out; "-" is standard input.

    Raises:
        InputError: no such file (near names are suggested), a folder, unreadable, empty, not UTF-8 text, or a
            format such as PDF that is not read yet.
    """
    if str(path) == STANDARD_INPUT:
        return decode(sys.stdin.buffer.read(), "standard input")
    path = Path(path).expanduser()
    return decode(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """What a file holds.

    Raises:
        InputError: no such file (near names are suggested), a folder, or unreadable.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give one file of it")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}{_near(path)}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def decode(data: bytes, name: str) -> str:
    """`data` as UTF-8 text; `name` says in messages where it came from.

    Raises:
        InputError: empty, not UTF-8 text, or a known format that is no text.
    """
    if not data.strip():
        raise InputError(f"{name} is empty; there is nothing to ask about")
    for signature, kind in SIGNATURES.items():
        if data.startswith(signature):
            raise InputError(f"{name} is {kind}, which longfit does not read yet; {REMEDY}")
    if data.startswith(UTF16_MARKS):
        raise InputError(f"{name} is text in UTF-16, and only UTF-8 is read; {REMEDY}")
    zero = data.find(b"\0")
    if zero >= 0:
        raise InputError(f"{name} is not text: byte {zero:,} is NUL; {REMEDY}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not text in UTF-8, the encoding that was tried: byte {error.start:,} "
            f"(0x{data[error.start]:02x}) does not belong there; {REMEDY}"
        ) from error
    if not text.strip():
        raise InputError(f"{name} is empty; there is nothing to ask about")
    return text


def _near(path: Path) -> str:
    """A suggestion of files in the same folder."""
    folder = path.parent
    if not folder.is_dir():
        return f"; there is no folder {folder} either"
    try:
        names = sorted(file.name for file in folder.iterdir() if file.is_file())
    except OSError:
        return ""
    lowered = {name.lower(): name for name in names}
    found = difflib.get_close_matches(path.name.lower(), lowered, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(str(folder / lowered[name]) for name in found)}?" if found else ""

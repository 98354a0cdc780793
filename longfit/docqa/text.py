"""Plain text from bytes, with a refusal that names the reason."""

import difflib
import sys
from pathlib import Path

from longfit.errors import InputError

STANDARD_INPUT = "-"
MOST_FILE_BYTES = 256 * 2**20
MOST_TEXT_BYTES = 32 * 2**20
# What a file of this kind begins with -> what it is called.
SIGNATURES: dict[bytes, str] = {
    b"\xd0\xcf\x11\xe0": "an old or a protected Office file (DOC, XLS, PPT, or a DOCX with a password)",
    b"{\\rtf": "an RTF file",
    b"PK\x03\x04": "a ZIP archive without a DOCX document in it",
    b"\x1f\x8b": "a gzip archive",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
REMEDY = "save or export it as plain text in UTF-8, DOCX or PDF"


def read_bytes(path: str | Path) -> bytes:
    """What a file holds, or standard input for "-".

    Raises:
        InputError: no such file (near names are suggested), a folder, unreadable, or past `MOST_FILE_BYTES`.
    """
    if str(path) == STANDARD_INPUT:
        return _of_bounded_size(sys.stdin.buffer.read(MOST_FILE_BYTES + 1), "standard input")
    path = Path(path).expanduser()
    if path.is_dir():
        raise InputError(f"{path} is a folder; give one file of it")
    try:
        with path.open("rb") as file:
            return _of_bounded_size(file.read(MOST_FILE_BYTES + 1), str(path))
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}{_near(path)}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def decode(data: bytes, name: str) -> str:
    """`data` as UTF-8 text; `name` says in messages where it came from.

    Raises:
        InputError: empty, not UTF-8 text, a known format that is no text, or past `MOST_TEXT_BYTES`.
    """
    if len(data) > MOST_TEXT_BYTES:
        raise too_long(name, len(data))
    if not data.strip():
        raise InputError(f"{name} is empty; there is nothing to ask about")
    for signature, kind in SIGNATURES.items():
        if data.startswith(signature):
            raise InputError(f"{name} is {kind}, which longfit does not read; {REMEDY}")
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


def too_long(name: str, size: int) -> InputError:
    """The refusal of a text that passes the limit."""
    return InputError(
        f"{name} is {size:,} bytes of text, and one document may have {MOST_TEXT_BYTES:,} (some 8 million tokens); "
        "give a part of it"
    )


def _of_bounded_size(data: bytes, name: str) -> bytes:
    if len(data) > MOST_FILE_BYTES:
        raise InputError(f"{name} is larger than {MOST_FILE_BYTES:,} bytes, the most that is read; give a part of it")
    return data


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

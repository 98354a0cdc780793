"""DOCX and HTML files as Markdown: mammoth gives HTML of a DOCX, and markdownify makes Markdown of HTML.

These two are what markitdown runs for the same formats; it would bring a model that guesses file types, and the runtime
for it, besides.
"""

import io
import re
import zipfile

from longfit.docqa.extra import needed
from longfit.docqa.text import MOST_FILE_BYTES, decode
from longfit.errors import InputError

# What a page holds that nobody reads.
UNREAD = ("script", "style", "template", "noscript", "svg", "head")


def docx_text(data: bytes, name: str) -> str:
    """The text of a DOCX file as Markdown; pictures are left out.

    Raises:
        InputError: damaged, empty, or one that unpacks to more than `MOST_FILE_BYTES`.
        MissingPackageError: mammoth or markdownify is not installed.
    """
    mammoth = needed("mammoth", "reading a DOCX file")
    needed("markdownify", "reading a DOCX file")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if (size := sum(part.file_size for part in archive.infolist())) > MOST_FILE_BYTES:
                raise InputError(f"{name} unpacks to {size:,} bytes, more than the {MOST_FILE_BYTES:,} that are read")
        html = mammoth.convert_to_html(io.BytesIO(data), convert_image=mammoth.images.img_element(lambda image: {}))
    except InputError:
        raise
    except Exception as error:  # a damaged file ends in any error at all inside the parsers
        raise InputError(
            f"{name} is a damaged DOCX file: {error or type(error).__name__}; open it and save it anew"
        ) from error
    return _markdown(html.value, name)


def html_text(data: bytes, name: str) -> str:
    """The text of an HTML page as Markdown; scripts, styles and pictures are left out.

    Raises:
        InputError: what `decode` refuses where the page declares no other encoding, or a page without text.
        MissingPackageError: markdownify is not installed.
    """
    needed("markdownify", "reading an HTML page")
    detector = needed("bs4.dammit", "reading an HTML page").EncodingDetector
    declared = detector.find_declared_encoding(data, is_html=True)
    if declared and declared.lower() not in ("utf-8", "utf8"):
        try:
            return _markdown(data.decode(declared), name)
        except (LookupError, UnicodeDecodeError):
            pass  # a page that is wrong about itself may still be UTF-8
    return _markdown(decode(data, name), name)


def _markdown(html: str, name: str) -> str:
    markdownify, bs4 = needed("markdownify", "reading this file"), needed("bs4", "reading this file")
    try:
        page = bs4.BeautifulSoup(html, "html.parser")
        for tag in page(UNREAD):
            tag.decompose()
        converter = markdownify.MarkdownConverter(
            heading_style="ATX", strip=["a", "img"], escape_asterisks=False, escape_underscores=False, escape_misc=False
        )
        text = converter.convert_soup(page)
    except RecursionError as error:
        raise InputError(f"{name} nests its tags too deeply to be read; save it as plain text") from error
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()
    if not text:
        raise InputError(f"{name} is empty: no text is left of it without its scripts and pictures")
    return text

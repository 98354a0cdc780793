"""Documents from files: the text and pages of every format, and a refusal with its reason for what cannot be read."""

import io
import sys
import zipfile

import pytest

from longfit.docqa import document_of, read_document
from longfit.docqa import text as limits
from longfit.docqa.pdf_pages import clean
from longfit.errors import InputError, MissingPackageError
from tests.documents import docx, paragraph, pdf, set_pdf


def test_text_and_markdown_stay_as_they_are(tmp_path):
    path = tmp_path / "notes.md"
    path.write_bytes(b"\xef\xbb\xbf\n# Caf\xc3\xa9\r\n\r\n* *one*\r\n")
    read = read_document(path)
    assert (read.name, read.text, read.pages) == ("notes.md", "# Café\n\n* *one*", ())
    assert read.page_of(3) is None


def test_a_pdf_knows_its_pages():
    read = document_of(pdf(["The lamp was lit at four.", "", "The keeper slept."]), "log.pdf")
    assert read.text == "The lamp was lit at four.\n\nThe keeper slept."
    assert [read.text[page.start : page.end] for page in read.pages] == [
        "The lamp was lit at four.",
        "",
        "The keeper slept.",
    ]
    assert [page.number for page in read.pages] == [1, 2, 3]
    assert read.page_of(0) == 1 and read.page_of(24) == 1 and read.page_of(read.text.index("keeper")) == 3


def test_a_pdf_that_anyone_may_open_is_read_although_it_is_encrypted():
    assert "lamp" in document_of(pdf(["The lamp."], owner="secret"), "log.pdf").text


def test_a_docx_becomes_markdown():
    table = f"<w:tbl><w:tr><w:tc>{paragraph('oil')}</w:tc><w:tc>{paragraph('40 l')}</w:tc></w:tr></w:tbl>"
    read = document_of(docx(paragraph("The *lamp* was_lit.") + paragraph("At four.") + table), "log.docx")
    assert read.text.startswith("The *lamp* was_lit.\n\nAt four.\n\n") and "| oil | 40 l |" in read.text


def test_html_loses_its_scripts_and_markup_but_not_its_words():
    page = "<html><head><title>x</title><style>p{}</style></head><body><h1>Log</h1><p>The <b>lamp</b> at 4 &lt; 5.</p>"
    page += "<script>evil()</script><ul><li>one</li></ul><a href='http://x'>a link</a></body></html>"
    read = document_of(page.encode(), "log.html")
    assert read.text == "# Log\n\nThe **lamp** at 4 < 5.\n\n* one\n\na link"
    assert document_of(b"  <!DOCTYPE html><p>bare</p>", "upload").text == "bare"
    latin = '<html><meta charset="iso-8859-1"><p>café</p></html>'.encode("latin-1")
    assert document_of(latin, "old.htm").text == "café"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"caf\xe9 noir", "UTF-8.*byte 3"),
        ("wide".encode("utf-16"), "UTF-16"),
        (b"ab\0c", "NUL"),
        (b"\x89PNG\r\n\x1a\n\0", "picture"),
        (b"\xd0\xcf\x11\xe0 doc", "password"),
        (b"<html><script>x</script></html>", "no text is left"),
        (b"<html>" + b"<div>" * 20_000 + b"x", "nests its tags"),
        (b"%PDF-1.7 and then nothing of the kind", "damaged PDF"),
        (b"PK\x03\x04 word/document.xml and no more", "damaged DOCX"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_reason(data, reason):
    with pytest.raises(InputError, match=f"^the file.*{reason}"):
        document_of(data, "the file")


def test_a_protected_a_scanned_and_a_cut_pdf():
    with pytest.raises(InputError, match=r"protected by a password.*qpdf"):
        document_of(pdf(["secret"], password="open"), "x.pdf")
    with pytest.raises(InputError, match=r"2 pages without any text.*ocrmypdf"):
        document_of(pdf(["", ""]), "x.pdf")
    whole = pdf(["one", "two"])
    with pytest.raises(InputError, match=r"x\.pdf is a damaged PDF|without any text"):
        document_of(whole[: len(whole) // 3], "x.pdf")


def test_words_that_only_a_gap_divides_are_words():
    """TeX moves the pen in place of writing a space, and by little where a line is full."""
    assert document_of(set_pdf("[(The)-220(lamp)-180(w)20(as)-250(lit.)]"), "tex.pdf").text == "The lamp was lit."


def test_dots_that_lead_to_a_page_number_are_three():
    assert clean("1.1 What is this? . . . . . . . . . . 1\r\nand so on....") == "1.1 What is this? ... 1\nand so on...."


def test_a_word_divided_at_the_end_of_a_line_is_whole():
    assert (
        clean("pointers to other docu\x02mentation\r\nwill be\0 given ")
        == "pointers to other documentation\nwill be given"
    )


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import os; os.abort()", "ended with -6"),
        ("raise MemoryError('no room')", "no room"),
        ("import time; time.sleep(60)", "within 1 s"),
    ],
)
def test_a_pdf_that_breaks_or_holds_up_its_reader_is_refused(script, reason, tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text(script)
    monkeypatch.setattr("longfit.docqa.pdf.READER", broken)
    monkeypatch.setattr("longfit.docqa.pdf.MOST_SECONDS", 1)
    with pytest.raises(InputError, match=rf"x\.pdf is a damaged PDF.*{reason}"):
        document_of(pdf(["one"]), "x.pdf")


def test_a_pdf_of_too_much_text_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr("longfit.docqa.pdf.MOST_TEXT_BYTES", 20)
    with pytest.raises(InputError, match=r"x\.pdf is \d+ bytes of text.*give a part"):
        document_of(pdf(["The lamp was lit at four.", "more"]), "x.pdf")


def test_other_archives_and_those_that_unpack_to_too_much(monkeypatch):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(InputError, match="ZIP archive without a DOCX"):
        document_of(file.getvalue(), "x.zip")
    monkeypatch.setattr("longfit.docqa.markup.MOST_FILE_BYTES", 2000)
    with pytest.raises(InputError, match="unpacks to"):
        document_of(docx(paragraph("a" * 4000)), "x.docx")


def test_two_hundred_megabytes_of_text_are_refused_without_being_decoded(tmp_path):
    path = tmp_path / "big.txt"
    with path.open("wb") as file:
        for _ in range(200):
            file.write(b"word " * (2**20 // 5) + b" ")
    with pytest.raises(InputError, match=r"big\.txt is 20.* bytes of text.*33,554,432.*give a part"):
        read_document(path)


def test_a_file_past_the_limit_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MOST_FILE_BYTES", 1000)
    path = tmp_path / "big.pdf"
    path.write_bytes(b"x" * 1001)
    with pytest.raises(InputError, match="larger than 1,000 bytes"):
        read_document(path)


@pytest.mark.parametrize(
    ("package", "data", "name"),
    [
        ("pypdfium2", b"%PDF-1.7", "a.pdf"),
        ("mammoth", docx(paragraph("a")), "a.docx"),
        ("markdownify", b"<p>a", "a.html"),
    ],
)
def test_a_missing_package_names_what_to_install(package, data, name, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf'needs {package}.*pip install "longfit\[documents\]"'):
        document_of(data, name)

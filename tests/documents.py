"""Documents in every format, made in code."""

import io
import zipfile
from collections.abc import Sequence


def pdf(pages: Sequence[str], password: str | None = None, owner: str | None = None) -> bytes:
    """A PDF with one page for each text; an empty text is a page that holds a drawing only."""
    from fpdf import FPDF

    made = FPDF()
    made.set_font("Helvetica", size=11)
    if password is not None or owner is not None:
        made.set_encryption(owner_password=owner or "owner", user_password=password or "", encryption_method="AES-256")
    for text in pages:
        made.add_page()
        if text:
            made.multi_cell(0, 6, text)
        else:
            made.rect(20, 20, 100, 100, style="F")
    return bytes(made.output())


def set_pdf(shown: str) -> bytes:
    """A PDF of one page whose text is this operand of TJ, as typesetters write it: words and the gaps between them."""
    stream = f"BT /F1 12 Tf 72 700 Td {shown} TJ ET"
    parts = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        "/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Times-Roman >> >> >> >>",
        f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
    ]
    made, places = "%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        places.append(len(made))
        made += f"{number} 0 obj\n{part}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    made += f"xref\n0 5\n0000000000 65535 f \n{table}trailer\n<< /Size 5 /Root 1 0 R >>\nstartxref\n{len(made)}\n%%EOF"
    return made.encode("latin-1")


def docx(body: str) -> bytes:
    """A DOCX whose body is this WordprocessingML."""
    types = (
        '<?xml version="1.0"?><Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Override PartName="/word/document.xml" ContentType='
        '"application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>'
    )
    rels = (
        '<?xml version="1.0"?><Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
        '<Relationship Id="r1" Target="word/document.xml" Type='
        '"http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"/></Relationships>'
    )
    document = (
        '<?xml version="1.0"?><w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main">'
        f"<w:body>{body}</w:body></w:document>"
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        parts = {"[Content_Types].xml": types, "_rels/.rels": rels, "word/document.xml": document}
        for name, part in parts.items():
            archive.writestr(name, part)
    return file.getvalue()


def paragraph(text: str) -> str:
    return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"

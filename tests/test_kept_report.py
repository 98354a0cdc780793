"""The report of a memory: one HTML file that works alone, and one PNG; no model is loaded."""

import json
import re

import numpy as np
import pytest
import torch
from selenium.webdriver.support.ui import WebDriverWait

from longfit.cli import app
from longfit.docqa import Document, Page, compress
from longfit.docqa.kept import Kept
from longfit.docqa.kept_plot import LINE_CHARACTERS, as_page, by_position
from longfit.docqa.kept_report import report
from longfit.errors import MemoryFileError
from tests.browser import chromium, complaints, resize
from tests.serving import tiny

TEXT = "".join(f"line {n}: the lamp <b>&amp; was lit at {n % 10}.\n" for n in range(2, 90))


@pytest.fixture
def saved(tmp_path):
    model, tokenizer = tiny(budget="500 tokens")
    document = Document("a </script><i>log.txt", TEXT.strip(), (Page(1, 0, 300), Page(2, 300, len(TEXT.strip()))))
    return compress(model, tokenizer, [document]).save(tmp_path / "log.ctx")


def test_the_html_needs_nothing_else_and_holds_the_text_as_text(saved, tmp_path):
    page, picture = report(saved, tmp_path / "out")
    assert (page.name, picture.name) == ("log.kept.html", "log.kept.png")
    text = page.read_text()
    assert not re.search(r"""(src|href)\s*=|url\(|@import|import\(|https?://""", text)
    assert text.count("</script>") == 2 and "<b>" not in text and "<i>log" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["documents"][0]["text"] == TEXT.strip() and data["share"][0] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [file.read_bytes() for file in report(saved, tmp_path / "again")] == [
        file.read_bytes() for file in (page, picture)
    ]


def test_the_html_works_from_a_file(saved, tmp_path):
    page, _ = report(saved, tmp_path)
    with chromium() as browser:
        resize(browser, 360, 740, mobile=True)
        browser.get(page.as_uri())
        look = "return [...document.querySelectorAll('.kept-block span')].map(s => s.className + s.textContent.length)"
        mean = WebDriverWait(browser, 20, 0.05).until(lambda _: browser.execute_script(look))  # its scripts run later
        assert len(set(mean)) > 4 and browser.execute_script("return document.scrollingElement.scrollWidth") == 360
        assert "layers, " in browser.find_element("id", "layer-name").text
        browser.find_element("id", "layer").send_keys("\ue014")  # arrow to the right
        assert browser.find_element("id", "layer-name").text.startswith("layer 0")
        assert browser.execute_script(look) != mean
        assert browser.execute_script("return document.querySelectorAll('[data-page]').length") == 2
        assert complaints(browser) == []


def test_the_command_line_writes_it_and_says_where(saved, tmp_path, capsys):
    app(["report", "--memory", str(saved), "-o", str(tmp_path / "o")], standalone_mode=False)
    assert capsys.readouterr().out.split() == [str(tmp_path / "o" / f"log.kept.{kind}") for kind in ("html", "png")]


def test_folders_that_cannot_be_reported_are_refused(saved, tmp_path):
    with pytest.raises(MemoryFileError, match="no memory"):
        report(tmp_path / "nowhere", tmp_path)
    source = next(saved.glob("source-*.json"))
    source.write_text(source.read_text() + " ")
    with pytest.raises(MemoryFileError, match="changed"):
        report(saved, tmp_path)


def test_a_memory_without_its_text_is_refused(tmp_path):
    model, _ = tiny()
    model.compress(torch.ones(1, 300, dtype=torch.long)).save(tmp_path / "m")
    with pytest.raises(MemoryFileError, match="does not know the text"):
        report(tmp_path / "m", tmp_path)


def test_the_picture_places_letters_as_the_text_does():
    text = "ab c\n\n" + "d" * (LINE_CHARACTERS + 2)
    starts = np.arange(len(text))
    spans = np.stack([np.zeros_like(starts), starts, starts + 1], 1)
    shares = np.zeros((2, len(text)), np.float32)
    shares[:, 3], shares[0, -1] = 1, 1
    page = as_page(Kept(shares, (0, 1), spans), [Document("one", text)])
    assert page.shape == (4, LINE_CHARACTERS)
    assert page[0, [0, 1, 3]].tolist() == [0, 0, 100] and np.isnan(page[0, [2, 4]]).all()
    assert np.isnan(page[1]).all() and (page[2] == 0).all() and page[3, :2].tolist() == [0, 50]
    bins = by_position(Kept(shares, (0, 1), spans))
    assert bins.shape == (2, len(text)) and bins[0, 3] == 100 and bins[1, -1] == 0

"""The page as a user has it, in a real Chromium: a document is uploaded, the server ends and starts again, and
questions are asked of the memory that it finds.

    python recipes/docqa/page.py DOCUMENT QUESTIONS -o runs/page [--serve "-b 10%"]

QUESTIONS has one question a line. Needs `pip install "longfit[serve,documents]" selenium` and Debian's chromium and
chromium-driver. Writes transcript.md (each answer with its passages and seconds, and what the server said of the
memory) and screenshots. The state folder stays below the output, so that a second run finds the memory.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

PATIENCE = 3600
LAST = "#turns > li:last-child"


@contextmanager
def server(state: Path, options: list[str]) -> Iterator[str]:
    """The address of a `longfit serve` in a process of its own."""
    command = [sys.executable, "-m", "longfit", "serve", "-p", "0", "--state", str(state), *options]
    log = (state.parent / "serve.log").open("a+", encoding="utf-8")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
    try:
        while process.poll() is None:
            log.seek(0)
            if found := re.findall(r"http://127\.0\.0\.1:\d+", log.read()):
                yield found[-1]
                return
            time.sleep(0.2)
        log.seek(0)
        raise SystemExit(f"the server did not start:\n{log.read()}")
    finally:
        process.terminate()
        process.wait()
        log.close()
        Path(log.name).unlink()


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser of 1,280 by 900."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield made
    finally:
        made.quit()


class Page:
    """What a user does on the page."""

    def __init__(self, browser: Any, url: str, folder: Path) -> None:
        self.browser, self.url, self.folder = browser, url, folder
        browser.get(url)
        self.wait(lambda: self.one("#send").is_enabled())

    def one(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def wait(self, good: Any) -> None:
        WebDriverWait(self.browser, PATIENCE, 0.1).until(lambda _: good())

    def shoot(self, name: str) -> None:
        self.browser.save_screenshot(str(self.folder / f"{name}.png"))

    def documents(self) -> list[dict[str, Any]]:
        with urlopen(f"{self.url}/v1/documents") as reply:
            listed: list[dict[str, Any]] = json.load(reply)["data"]
        return listed

    def upload(self, document: Path) -> float:
        """Seconds until the text stands there, shaded."""
        started = time.monotonic()
        self.one("#file").send_keys(str(document.resolve()))
        self.wait(lambda: any((entry.get("tokens_done") or 0) > 0 for entry in self.documents()))
        time.sleep(1)
        self.shoot("reading")
        self.shown()
        return time.monotonic() - started

    def shown(self) -> None:
        self.wait(lambda: self.browser.find_elements(By.CSS_SELECTOR, ".kept-block span"))

    def done(self) -> bool:
        return bool(self.one(LAST).get_attribute("aria-busy") == "false")

    def ask(self, question: str) -> tuple[str, list[str], float, float]:
        """The answer, its passages, and the seconds to its first letter and to the last passage."""
        started = time.monotonic()
        self.one("#question").send_keys(question, Keys.ENTER)
        self.wait(lambda: question in self.one(LAST).text)
        self.wait(lambda: self.one(f"{LAST} .answer").text.strip("…") or self.done())
        first = time.monotonic() - started
        self.wait(self.done)
        passages = [found.text for found in self.one(LAST).find_elements(By.CSS_SELECTOR, ".citations button")]
        return self.one(f"{LAST} .answer").text, passages, first, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--serve", default="", help="options of longfit serve, in one string")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    state, options = given.output.resolve() / "state", shlex.split(given.serve)
    questions = [line.strip() for line in given.questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    lines = [f"# {given.document.name} on the page", "", f"`longfit serve {given.serve}`".replace(" `", "`"), ""]
    with chromium() as browser:
        with server(state, options) as url:
            page = Page(browser, url, given.output)
            if not page.documents():
                lines += [f"Uploaded, read and compressed in {page.upload(given.document):.0f} s.", ""]
            (about,) = page.documents()
            page.shoot("ready")
        with server(state, options) as url:
            page = Page(browser, url, given.output)
            page.one("#documents li button").click()
            page.shown()
            told = {key: about.get(key) for key in ("tokens_in", "kept_tokens", "kv_bytes", "full_kv_bytes")}
            lines += ["The server ended, another started, and found the memory: " + json.dumps(told), ""]
            for number, question in enumerate(questions, 1):
                answer, passages, first, whole = page.ask(question)
                lines += [f"## {question}", "", answer, ""]
                lines += ["- " + " / ".join(passage.splitlines()) for passage in passages]
                lines += ["", f"{first:.1f} s to the first word, {whole:.1f} s with its passages.", ""]
                if passages:
                    page.one(f"{LAST} .citations button").click()
                    time.sleep(0.5)
                page.shoot(f"answer-{number}")
                page.one("#again").click()
        wrong = [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        lines += [f"The browser's console: {wrong or 'nothing'}."]
    text = "\n".join(lines) + "\n"
    (given.output / "transcript.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""The page in a real browser: upload, ask, citations, the slider; on a phone; with the keyboard alone."""

import pytest
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser import chromium, complaints, resize
from tests.serving import served, tiny

TEXT = "".join(f"line {n}: the lamp was lit at {n % 10}.\n" for n in range(60))


@pytest.fixture(scope="module")
def browser():
    with chromium() as made:
        yield made


@pytest.fixture
def page(browser, tmp_path):
    with served(tmp_path / "state", *tiny(budget="400 tokens")) as made:
        resize(browser, 1280, 900)
        browser.get(made.url)
        made.browser = browser
        wait(browser, lambda: one(browser, "#send").is_enabled())
        yield made


def wait(browser, good):
    return WebDriverWait(browser, 20, 0.05).until(lambda _: good())


def press(browser, *keys):
    """Keys to whatever has the focus."""
    ActionChains(browser).send_keys(*keys).perform()


def one(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def every(browser, selector):
    return browser.find_elements(By.CSS_SELECTOR, selector)


def upload(page, tmp_path, text=TEXT, name="log.txt"):
    file = tmp_path / name
    file.write_text(text)
    one(page.browser, "#file").send_keys(str(file))
    wait(page.browser, lambda: one(page.browser, "#kept").is_displayed() and every(page.browser, ".kept-block span"))


def shading(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('.kept-block span')].map(s => s.className + s.textContent.length)"
    )


def ask(page, question="who"):
    one(page.browser, "#question").send_keys(question, Keys.ENTER)
    wait(page.browser, lambda: one(page.browser, "#turns li:last-child").get_attribute("aria-busy") == "false")


def test_upload_ask_read_the_answer_and_its_citations_and_look_at_the_layers(page, tmp_path):
    browser = page.browser
    upload(page, tmp_path)
    assert one(browser, "#kept").text.startswith("line 0: the lamp was lit at 0.\nline 1")
    assert int(one(browser, "#meter").get_attribute("aria-valuenow")) > 0
    assert "400 of" in one(browser, "#costs-text").text and "in each layer" in one(browser, "#costs-text").text
    ask(page)
    assert one(browser, ".answer").text and one(browser, ".asked").text == "who"
    citations = every(browser, ".citations button")
    assert 0 < len(citations) <= 3 and "kept" in citations[0].text
    assert {"verified", "not found"} & set(citations[0].text.replace("· ", "\n").split("\n"))
    citations[-1].click()
    marked = "".join(span.text for span in every(browser, ".cited"))
    assert marked.strip() and marked.strip()[:8] in TEXT
    assert browser.switch_to.active_element.get_attribute("id") == "kept"
    mean = shading(browser)
    slider = one(browser, "#layer")
    assert slider.get_attribute("max") == "2" and one(browser, "#layer-name").text.startswith("all layers, ")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert one(browser, "#layer-name").text.startswith("layer 0, ") and shading(browser) != mean
    assert slider.get_attribute("aria-valuetext").startswith("layer 0")
    assert complaints(browser) == []


def test_a_passage_far_down_a_long_text_comes_into_sight(page, tmp_path):
    browser = page.browser
    upload(page, tmp_path, TEXT.strip() * 5)
    resize(browser, 360, 740, mobile=True)
    browser.execute_script("scrollTo(0, 0)")
    for start in (len(TEXT) * 4, len(TEXT)):
        inside = browser.execute_async_script(
            "const done = arguments[1];"
            "import('/page/page.js').then(({ state }) => { state.kept.cite(0, arguments[0], arguments[0] + 40);"
            "setTimeout(() => { const box = document.getElementById('kept').getBoundingClientRect();"
            "const at = document.querySelector('.cited').getBoundingClientRect();"
            "done(at.top >= Math.max(0, box.top) && at.bottom <= Math.min(innerHeight, box.bottom)); }, 300); })",
            start,
        )
        assert inside is True


def test_shading_is_what_was_kept(page, tmp_path):
    upload(page, tmp_path)
    (document,) = page.server.library.records
    given = page.http.get(f"/v1/documents/{document.id}/kept").json()
    shares = page.browser.execute_script(
        "return fetch('/page/kept.js').then(() => import('/page/kept.js')).then(async (m) =>"
        " [...(await m.unpack(arguments[0])).rows[0]])",
        given,
    )
    classes = page.browser.execute_script(
        "return [...document.querySelectorAll('.kept-block span')].flatMap("
        "s => Array([...s.textContent].length).fill(s.className))"
    )
    expected = [f"k{0 if share == 0 else max(1, int(share * 8 / 100 + 0.5))}" for share in shares]
    assert classes == expected[: len(classes)] and len(classes) > 1000 and len(set(classes)) > 2


def test_a_phone_shows_everything_without_scrolling_sideways(page, tmp_path):
    browser = page.browser
    upload(page, tmp_path, TEXT + "w" * 300, "a-very-long-name-" * 8 + ".txt")
    ask(page)
    resize(browser, 360, 740, mobile=True)
    widest = browser.execute_script("return document.scrollingElement.scrollWidth")
    assert widest == 360
    for button in every(browser, "button:not([hidden])"):
        if button.is_displayed():
            assert button.size["height"] >= 40 and button.rect["x"] + button.size["width"] <= 360


def test_the_keyboard_alone_is_enough(page, tmp_path):
    browser = page.browser
    upload(page, tmp_path)

    def focused():
        return browser.execute_script(
            "const a = document.activeElement; return a.id || a.dataset.key?.split(' ')[0] || a.tagName"
        )

    browser.execute_script("document.activeElement.blur()")
    met = []
    for _ in range(9):
        press(browser, Keys.TAB)
        met.append(focused())
    wanted = ["file", "SUMMARY", "open", "delete", "question", "send", "layer", "kept"]
    assert [name for name in met if name in wanted] == wanted
    one(browser, "#question").click()
    press(browser, "who", Keys.TAB, Keys.SPACE)  # the button
    wait(browser, lambda: every(browser, ".citations button"))
    wait(browser, lambda: focused() == "question")
    ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    assert "citations" in browser.execute_script("return document.activeElement.closest('ul').className")
    press(browser, Keys.ENTER)
    wait(browser, lambda: every(browser, ".cited"))


def test_every_control_has_a_name_and_answers_are_announced(page, tmp_path):
    browser = page.browser
    upload(page, tmp_path)
    ask(page)
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = {"button", "slider", "textbox", "meter", "region"}
    found = [node for node in nodes if node.get("role", {}).get("value") in controls]
    assert len(found) > 6 and all(node["name"]["value"].strip() for node in found)
    assert one(browser, "#turns").get_attribute("aria-live") == "polite"
    assert one(browser, "#problem").get_attribute("role") == "alert"


def test_what_cannot_be_read_is_said_and_the_page_goes_on(page, tmp_path):
    browser = page.browser
    file = tmp_path / "empty.txt"
    file.write_text(" ")
    one(browser, "#file").send_keys(str(file))
    wait(browser, lambda: "empty" in one(browser, "#problem").text)
    upload(page, tmp_path)
    assert not one(browser, "#problem").is_displayed()
    ask(page, "when " * 100)
    assert "the budget holds" in one(browser, "#turns .problem").text
    assert one(browser, "#question").get_attribute("value").startswith("when when")


def test_text_of_a_client_is_never_markup(page, tmp_path):
    browser = page.browser
    upload(page, tmp_path, "<img src=x onerror=document.title='bad'> a lamp" * 9, "<b>name.txt")
    ask(page, "<i>who</i>")
    assert one(browser, "#documents .open").text.startswith("<b>name.txt")
    assert one(browser, ".asked").text == "<i>who</i>" and not every(browser, "#kept img, #turns i")
    assert browser.title == "longfit"


def test_an_answer_can_be_stopped_and_a_conversation_begun_anew(page, tmp_path):
    browser = page.browser
    upload(page, tmp_path)
    page.server.settings.__dict__["answer_tokens"] = 20_000
    one(browser, "#question").send_keys("who", Keys.ENTER)
    wait(browser, lambda: one(browser, "#stop").is_displayed() and len(one(browser, ".answer").text) > 3)
    one(browser, "#stop").click()
    wait(browser, lambda: "Stopped." in one(browser, "#turns").text)
    wait(browser, lambda: page.server.worker._running is None)
    one(browser, "#again").click()
    assert not every(browser, "#turns li")


def test_a_paste_and_a_delete(page):
    browser = page.browser
    one(browser, "#paste summary").click()
    one(browser, "#pasted").send_keys("a lamp and a boat")
    one(browser, "#paste button").click()
    wait(browser, lambda: one(browser, "#kept").is_displayed())
    assert one(browser, "#kept").text == "a lamp and a boat"
    one(browser, "#documents .delete").click()
    browser.switch_to.alert.accept()
    wait(browser, lambda: not every(browser, "#documents li"))
    assert not one(browser, "#kept").is_displayed() and not page.server.library.records


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_of_all_text_is_enough(dark, tmp_path):
    with chromium(dark) as browser, served(tmp_path / "state", *tiny(budget="400 tokens")) as made:
        made.browser = browser
        resize(browser, 1280, 900)
        browser.get(made.url)
        wait(browser, lambda: one(browser, "#send").is_enabled())
        upload(made, tmp_path)
        ask(made)
        found = browser.execute_script(CONTRASTS)
    assert len(found) > 15
    assert {text: contrast for text, contrast in found.items() if contrast < 4.5} == {}


# For each look of visible text its contrast against what is behind it (WCAG 2.2), colours drawn by the browser itself.
CONTRASTS = """
const context = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const drawn = (colours) => {
  context.clearRect(0, 0, 1, 1);
  for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const found = {};
for (const node of document.querySelectorAll('body *')) {
  const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  if (!own || !node.checkVisibility() || node.disabled) continue;
  const behind = [];
  for (let at = node; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
  const ground = drawn(behind);
  const [a, b] = [light(drawn([`rgb(${ground})`, getComputedStyle(node).color])), light(ground)].sort((x, y) => y - x);
  const name = `${node.tagName} ${node.className} ${node.textContent.trim().slice(0, 12)}`;
  found[name] = (a + 0.05) / (b + 0.05);
}
return found;
"""

"""Web page in a real browser: its files, the key, the layout and the stages panel."""

from __future__ import annotations

import re
import urllib.request
from html.parser import HTMLParser

import pytest
from playwright.sync_api import expect
from pretend_server import KEY, STAGES, labels
from pretend_user import ask

from finlora.serve.http.web_page import PAGE_FOLDER

HOSTILE = '<img src=x onerror="window.isHit=true"><script>window.isHit=true</script>\'&quot;'


class Markup(HTMLParser):
    """Parser that collects what the content policy forbids."""

    def __init__(self) -> None:
        super().__init__()
        self.inline, self.links, self.names, self.inside = [], [], [], None

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.inline += [name for name, _ in attrs if name == "style" or name.startswith("on")]
        self.links += [value for name, value in attrs if name in ("src", "href", "action")]
        self.names += [value for name, value in attrs if name == "name" and tag in ("input", "textarea", "select")]

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside in ("script", "style") and data.strip():
            self.inline.append(data)


def test_markup_has_no_inline_code_and_no_other_host():
    markup = Markup()
    markup.feed((PAGE_FOLDER / "index.html").read_text())
    assert markup.inline == []
    assert all(link.startswith("/") and not link.startswith("//") for link in markup.links)
    assert markup.names == [], "a form submits named fields if the script does not run"


def test_scripts_insert_only_text_and_stay_short():
    sinks = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|https?://(?!www\.w3)"
    )
    files = [*PAGE_FOLDER.glob("*.js"), *PAGE_FOLDER.glob("*.css")]
    assert len(files) >= 3
    assert {file.name: sinks.findall(file.read_text()) for file in files} == {file.name: [] for file in files}
    assert [file.name for file in PAGE_FOLDER.iterdir() if len(file.read_text().splitlines()) > 300] == []


def test_files_need_no_key_and_have_a_strict_policy(address):
    for path, kind in (("/", "text/html"), ("/page/app.js", "text/javascript"), ("/page/style.css", "text/css")):
        with urllib.request.urlopen(address + path, timeout=10) as reply:
            assert reply.status == 200
            assert reply.headers["Content-Type"].startswith(kind)
            assert reply.headers["Content-Security-Policy"].startswith("default-src 'self';")
            assert "unsafe" not in reply.headers["Content-Security-Policy"]
            assert reply.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_enough_contrast(scheme):
    """Text has 4.5:1 against its background (WCAG 2.2, 1.4.3), edges of fields 3:1 (1.4.11)."""
    blocks = re.findall(r":root \{(.*?)\}", (PAGE_FOLDER / "style.css").read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", blocks[0] + (blocks[1] if scheme == "dark" else "")))

    def luminance(name):
        digits = colours[name].removeprefix("#")
        digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
        shares = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one, other):
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    texts = [(text, ground) for text in ("ink", "quiet", "accent") for ground in ("panel", "ground")]
    texts += [(text, "panel") for text in ("good", "warning", "danger")]
    texts += [("danger", "danger-soft"), ("quiet", "danger-soft"), ("accent-ink", "accent"), ("mark-ink", "mark")]
    assert {pair: contrast(*pair) for pair in texts if contrast(*pair) < 4.5} == {}
    assert contrast("edge", "panel") >= 3


def test_key_is_asked_once_and_kept_only_in_the_tab(page, browser, address):
    page.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The key was not accepted. Enter a key of this server.")
    page.get_by_label("Key", exact=True).fill("two words")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("without spaces")
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_be_focused()
    page.reload()
    expect(page.locator("#text")).to_be_focused()
    assert page.evaluate("[localStorage.length, document.cookie, location.href]") == [0, "", f"{address}/"]
    with browser.new_context() as other:
        stranger = other.new_page()
        stranger.goto(address)
        expect(stranger.get_by_label("Key", exact=True)).to_be_focused()
    page.get_by_role("button", name="Forget key").click()
    expect(page.get_by_label("Key", exact=True)).to_be_focused()
    assert page.evaluate("sessionStorage.length") == 0
    assert KEY not in page.content()


def test_revoked_key_is_asked_for_again(desk, script):
    script.failures["/v1/classify"] = (401, "unknown key", {})
    ask(desk, task="fpb")
    expect(desk.get_by_role("alert")).to_contain_text("The key was not accepted.")
    expect(desk.get_by_label("Key", exact=True)).to_be_focused()
    expect(desk.locator("#desk")).to_be_hidden()
    assert desk.evaluate("sessionStorage.length") == 0


def test_task_that_an_adapter_brings_is_listed_for_its_model(page, script):
    own = {
        "name": "letters",
        "title": "Tone of letters",
        "models": [script.models[1]],
        "about": "none",
        "quoted": False,
    }
    script.tasks = [*script.tasks, {**own, "labels": ["bad", "good"], "questions": []}]
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_be_focused()
    expect(page.locator("#task option", has_text="letters")).to_have_count(0)
    page.locator("#model").select_option(script.models[1])
    page.locator("#task").select_option("letters")
    expect(page.locator("#task-hint")).to_have_text("Tone of letters. Answers with one of: bad, good.")
    page.locator("#model").select_option(script.models[0])
    expect(page.locator("#task")).to_have_value("fpb")


def test_server_texts_never_become_markup(page, script):
    script.models = [HOSTILE]
    script.tasks = [{"name": HOSTILE, "about": "none", "labels": [HOSTILE, "b"], "questions": []}]
    script.answers["/v1/classify"] = labels({HOSTILE: 0.9, "b": 0.1})
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_be_focused()
    ask(page, HOSTILE)
    expect(page.locator(".verdict")).to_contain_text(HOSTILE)
    script.failures["/v1/classify"] = (400, HOSTILE, {})
    ask(page, HOSTILE)
    expect(page.locator(".failure")).to_contain_text(HOSTILE)
    script.pieces = [HOSTILE]
    ask(page, HOSTILE, task="")
    expect(page.locator(".stream")).to_have_text(HOSTILE)
    assert page.evaluate("window.isHit") is None
    assert page.locator("main img, main script").count() == 0


def test_stages_are_polled_each_second_while_visible(desk, script):
    expect(desk.locator("#stages li")).to_have_count(2)
    expect(desk.locator("#stages li").first).to_contain_text("Stage 1")
    first = desk.locator("#stages li").first.inner_text().replace("\n", " ")
    assert all(words in first for words in ("layers 0–15", "62 % busy", "4.25 GiB weights, 0.50 GiB cache"))
    expect(desk.locator("#load")).to_contain_text("1,536 of 8,192 rows")
    expect(desk.locator("#load")).not_to_contain_text("Stage crashes")
    script.answers["/v1/stages"] = {**STAGES, "stages": []}
    expect(desk.locator("#link")).to_have_text("A stage is restarting.")
    expect(desk.locator("#seen")).to_contain_text("as of")
    small = [{**stage, "weights_gib": 0.0625} for stage in STAGES["stages"]]
    script.answers["/v1/stages"] = {**STAGES, "stages": small, "losses": 1, "recovery_s": 4.2}
    expect(desk.locator("#load")).to_contain_text("1, last recovery in 4.2 s")
    expect(desk.locator("#link")).to_have_text("Connected")
    expect(desk.locator("#stages li").first).to_contain_text("64.00 MiB weights")
    desk.evaluate(
        "Object.defineProperty(document, 'visibilityState', {value: 'hidden', configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    desk.wait_for_timeout(300)
    before = script.num_polls
    desk.wait_for_timeout(1500)
    assert script.num_polls == before
    desk.evaluate("delete document.visibilityState; document.dispatchEvent(new Event('visibilitychange'))")
    expect(desk.locator("#link")).to_have_text("Connected")
    desk.wait_for_timeout(2500)
    assert 2 <= script.num_polls - before <= 4


def test_keyboard_reaches_every_control_in_order(desk, script):
    desk.get_by_label("Task").select_option("ner")
    desk.get_by_label("Model").focus()
    reached = []
    for _ in range(8):
        reached.append(desk.evaluate("document.activeElement.id"))
        width = desk.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert width == "2px", f"{reached[-1]} does not show the keyboard focus"
        desk.keyboard.press("Tab")
    assert reached == ["model", "task", "text", "example", "open", "about", "threshold", "send"]
    nameless = (
        "[...document.querySelectorAll('input:not([hidden]), select, textarea')].filter(e => !e.labels.length).length"
    )
    assert desk.evaluate(nameless) == 0
    script.answers["/v1/classify"] = labels({"location": 0.9, "organization": 0.06, "person": 0.04})
    desk.locator("#example").press("Enter")
    desk.locator("#send").press("Enter")
    expect(desk.locator(".verdict")).to_contain_text("location")
    expect(desk.locator("#send")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_page_does_not_scroll_sideways(desk, script, scheme):
    desk.set_viewport_size({"width": 360, "height": 740})
    desk.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    ground = desk.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(244, 245, 243)", "dark": "rgb(18, 21, 23)"}[scheme]
    long = "Averylongwordwithoutanyspace" * 8
    script.answers["/v1/extract"] = {"answer": long, "grounded": True, "quote": {"start": 0, "end": 28}}
    ask(desk, long, task="xbrl_values", about=long)
    expect(desk.locator("mark")).to_be_visible()
    assert desk.evaluate("document.documentElement.scrollWidth") == 360
    script.answers["/v1/classify"] = labels({long: 0.6, "b": 0.4})
    ask(desk, long, task="fpb")
    expect(desk.locator(".bars")).to_be_visible()
    assert desk.evaluate("document.documentElement.scrollWidth") == 360
    del script.answers["/v1/classify"]
    ask(desk)
    expect(desk.locator(".bone").first).to_be_visible()
    assert desk.locator(".bone").first.evaluate("bone => getComputedStyle(bone).animationName") == "none"
    expect(desk.locator(".waiting")).to_be_in_viewport()


def test_text_file_is_read_and_binary_file_refused(desk):
    desk.locator("#file").set_input_files({"name": "a.xml", "mimeType": "text/xml", "buffer": "<a>€</a>".encode()})
    expect(desk.locator("#text")).to_have_value("<a>€</a>")
    desk.locator("#file").set_input_files({"name": "b.pdf", "mimeType": "text/plain", "buffer": b"\xff\xfe\x00"})
    expect(desk.locator(".failure")).to_contain_text("b.pdf is not a text in UTF-8.")
    expect(desk.locator("#text")).to_have_value("<a>€</a>")

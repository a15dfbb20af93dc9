"""Web page against a real server on the tiny base: it shows the server's numbers, and its messages fit the refusals."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect
from pretend_server import STAGES, TASKS, labels
from pretend_user import ask
from wire import send

from finlora.serve.http.finance import TaskList
from finlora.serve.http.status import StagesState
from finlora.serve.protocol import LabelResult

ESCAPE_ONCE_IT_STREAMS = """
new MutationObserver((_changes, observer) => {
  if (!document.querySelector(".stream.is-open")) return;
  observer.disconnect();
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
}).observe(document.body, { childList: true, subtree: true });
"""
"""Presses Escape inside the page: so small a model streams 900 tokens in 0.9 s, which a busy test process can miss."""


@pytest.fixture
def enter(browser, live):
    """Open the page with one of the server's keys."""
    contexts = []

    def open_page(key):
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        page.goto(live.address)
        page.get_by_label("Key", exact=True).fill(live.keys[key])
        page.keyboard.press("Enter")
        page.get_by_label("Model").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()


def test_fake_answers_match_the_real_schema():
    TaskList(data=TASKS)
    StagesState(**STAGES)
    LabelResult(**labels({"Yes": 0.9, "No": 0.1}, abstained=True)["results"][0])


def test_page_shows_the_servers_numbers(enter, live):
    page = enter("desk")
    page.get_by_label("Model").select_option("tiny:good")
    ask(page, "Profit rose 12 %", task="tfns")
    expect(page.locator(".bars li")).to_have_count(3)
    body = {"model": "tiny:good", "task": "tfns", "text": "Profit rose 12 %"}
    probabilities = send(live.address, "/v1/classify", live.keys["desk"], body).body["results"][0]["probabilities"]
    assert page.locator(".bars .name").all_inner_texts() == list(probabilities)
    shown = [float(re.sub("[^0-9.]", "", text)) for text in page.locator(".bars .number").all_inner_texts()]
    assert shown == pytest.approx([100 * share for share in probabilities.values()], abs=0.1)
    expect(page.locator("#stages li")).to_have_count(2)
    expect(page.locator("#link")).to_have_text("Connected")
    for index in range(2):  # the server is idle again
        expect(page.locator("#stages li").nth(index)).to_contain_text("0 % busy")
    expect(page.locator("#load")).to_contain_text(re.compile(r"Pipeline bubble\s*0 %"))


def test_streamed_text_equals_the_servers_and_escape_frees_its_cache(enter, live):
    page = enter("desk")
    page.get_by_label("Model").select_option("tiny:good")
    page.get_by_label("Task").select_option("")
    page.get_by_label("Longest answer, in tokens").fill("6")
    ask(page, "Explain a bond.")
    expect(page.locator(".about-answer")).to_be_visible()
    body = {"model": "tiny:good", "messages": [{"role": "user", "content": "Explain a bond."}], "max_tokens": 6}
    whole = send(live.address, "/v1/chat/completions", live.keys["desk"], body).body["choices"][0]
    assert page.locator(".stream").text_content() == whole["message"]["content"]
    assert whole["finish_reason"] == "length"
    expect(page.locator(".note")).to_contain_text("The answer was cut off at the length limit.")
    page.get_by_label("Longest answer, in tokens").fill("900")
    page.evaluate(ESCAPE_ONCE_IT_STREAMS)
    ask(page, "Explain a bond.")
    expect(page.locator("#answer")).to_contain_text("Stopped.")
    live.wait_until_idle()


def test_position_of_an_answer_is_shown_or_its_absence(enter):
    page = enter("desk")
    context = "<us-gaap:Revenues>1234</us-gaap:Revenues>"
    ask(page, context, task="xbrl_values", about="What is the value of Revenues?")
    expect(page.locator(".document")).to_have_text(context, timeout=60_000)
    expect(page.locator(".note").first).to_contain_text(re.compile("is (not )?in the document"))


def test_key_sees_only_its_models(enter):
    assert enter("narrow").locator("#model option").all_inner_texts() == ["tiny:good"]


@pytest.mark.parametrize(
    ("model", "task", "about", "title", "reason"),
    [
        ("tiny:chatty", "fpb", None, "This adapter cannot be used.", "template"),
        ("tiny", "ner", "Paris", "The question is not valid.", "is not in the text"),
    ],
)
def test_refusal_shows_the_servers_reason(enter, model, task, about, title, reason):
    page = enter("desk")
    page.get_by_label("Model").select_option(model)
    ask(page, "Profit rose 12 %", task=task, about=about)
    expect(page.get_by_role("heading", name=title)).to_be_visible()
    expect(page.locator(".said")).to_contain_text(reason)

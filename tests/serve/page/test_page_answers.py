"""Answers and errors on the web page, in a real browser."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect
from pretend_server import SEVEN, labels
from pretend_user import ask


def test_labels_are_shown_as_bars_with_numbers(desk, script):
    script.answers["/v1/classify"] = labels({"negative": 0.04, "neutral": 0.11, "positive": 0.85})
    desk.get_by_label("Model").select_option("llama-8b:sentiment-r4")
    ask(desk, task="fpb")
    expect(desk.locator(".verdict")).to_have_text("positive 85.0 %")
    assert desk.locator(".bars li").all_inner_texts() == ["positive\n85.0 %", "neutral\n11.0 %", "negative\n4.0 %"]
    widths = [fill.bounding_box()["width"] for fill in desk.locator(".fill").all()[:3]]
    whole = desk.locator(".bars .track").first.bounding_box()["width"]
    assert [width / whole for width in widths] == pytest.approx([0.85, 0.11, 0.04], abs=0.01)
    expected = {"model": "llama-8b:sentiment-r4", "task": "fpb", "texts": ["Profit rose 12 %"]}
    assert script.asked == [("/v1/classify", expected)]
    expect(desk.locator(".about-answer dd").last).to_have_text("req-0123456789")


def test_abstention_is_shown_and_no_label_highlighted(desk, script):
    shares = (0.01, 0.05, 0.1, 0.23, 0.41, 0.18, 0.02)
    script.answers["/v1/classify"] = labels(dict(zip(SEVEN, shares, strict=True)), abstained=True)
    desk.get_by_label("Abstain below").fill("60")
    ask(desk, task="nwgi")
    expect(desk.locator("#answer")).to_contain_text(
        "no label reaches 60 %. The most probable is mildly positive with 41.0 %"
    )
    assert desk.locator(".is-chosen").count() == 0
    assert script.asked[0][1]["threshold"] == 0.6


def test_entity_is_required_and_sent(desk, script):
    script.answers["/v1/classify"] = labels({"location": 0.9, "organization": 0.06, "person": 0.04})
    ask(desk, "An office in Rotterdam", task="ner")
    assert desk.locator("#about").evaluate("field => field.validity.valueMissing")
    assert script.asked == []
    ask(desk, "An office in Rotterdam", about="Rotterdam")
    expect(desk.locator(".verdict")).to_contain_text("location")
    assert script.asked[0][1]["about"] == "Rotterdam"


def test_question_of_a_fixed_list_is_chosen(desk, script):
    script.answers["/v1/classify"] = labels({"Yes": 0.9, "No": 0.1})
    desk.get_by_label("Task").select_option("headline")
    desk.get_by_label("Question", exact=True).select_option("price down")
    ask(desk, "Gold slips")
    expect(desk.locator(".verdict")).to_contain_text("Yes")
    assert script.asked[0][1]["about"] == "price down"


def test_quote_is_marked_by_unicode_characters(desk, script):
    context = "📈 𝒫rofit\n<b>6120000</b> and 6120000"
    start = context.index("6120000")
    script.answers["/v1/extract"] = {
        "answer": "6120000",
        "grounded": True,
        "quote": {"start": start, "end": start + 7},
    }
    ask(desk, context, task="xbrl_values", about="What is the profit?")
    expect(desk.locator("mark")).to_have_text("6120000")
    assert desk.locator(".document").evaluate("box => box.textContent") == context
    assert desk.locator("mark").evaluate("mark => mark.previousSibling.textContent") == context[:start]
    expected = {"model": "llama-8b", "task": "xbrl_values", "context": context, "question": "What is the profit?"}
    assert script.asked == [("/v1/extract", expected)]


def test_quote_far_down_is_scrolled_into_sight_and_a_missing_one_is_a_warning(desk, script):
    context = "a line\n" * 200 + "1234\n" + "a line\n" * 200
    start = context.index("1234")
    script.answers["/v1/extract"] = {"answer": "1234", "grounded": True, "quote": {"start": start, "end": start + 4}}
    ask(desk, context, task="xbrl_values", about="How much?")
    mark, box = desk.locator("mark").bounding_box(), desk.locator(".document").bounding_box()
    assert box["y"] < mark["y"] < box["y"] + box["height"]
    script.answers["/v1/extract"] = {"answer": "99", "grounded": False, "quote": None}
    ask(desk, context)
    expect(desk.locator(".note")).to_contain_text("is not in the document: check it before you use it")
    expect(desk.locator("mark")).to_have_count(0)


def test_text_is_shown_as_it_streams(desk, script):
    script.pieces = ["A basis point ", None, "is 0.01 %.\n\nNo more."]
    ask(desk, "Explain.", task="")
    expect(desk.locator(".stream")).to_have_text("A basis point ")
    expect(desk.locator("#answer")).to_have_attribute("aria-busy", "true")
    script.go.set()
    expect(desk.locator(".stream")).to_have_text("A basis point is 0.01 %.\n\nNo more.")
    expect(desk.locator("#answer")).to_have_attribute("aria-busy", "false")
    body = {
        "model": "llama-8b",
        "messages": [{"role": "user", "content": "Explain."}],
        "stream": True,
    }
    assert script.asked == [("/v1/chat/completions", body)]


def test_escape_cancels_the_request_and_keeps_the_text(desk, script):
    script.pieces = ["Half an ans", None]
    ask(desk, "Explain.", task="")
    expect(desk.locator(".stream")).to_have_text("Half an ans")
    desk.keyboard.press("Escape")
    expect(desk.locator("#answer")).to_contain_text("Stopped.")
    expect(desk.locator(".stream")).to_have_text("Half an ans")
    assert script.is_disconnected.wait(10), "the connection to the server was not closed"
    expect(desk.get_by_role("button", name="Stop")).to_be_hidden()


def test_incomplete_stream_is_an_error(desk, script):
    ends = {"": "Ask again", 'data: {"error": {"message": "stage 2 crashed"}}\n\n': "stage 2 crashed"}
    for number, (last, advice) in enumerate(ends.items()):
        script.pieces, script.last_event = [f"Half an ans {number}"], last
        ask(desk, "Explain.", task="")
        expect(desk.locator(".stream")).to_have_text(f"Half an ans {number}")
        expect(desk.locator(".failure")).to_contain_text("The answer is incomplete.")
        expect(desk.locator(".failure")).to_contain_text(advice)


ERRORS = [
    (403, "This key may not do that.", "Choose another model"),
    (413, "The text is too long for this server.", "Shorten it"),
    (400, "The question is not valid.", "Correct what the server names below"),
    (422, "This adapter cannot be used.", "Choose another model"),
    (500, "The server failed on this question.", "give the request id to the administrator"),
    (503, "The model cannot answer now.", "Try again shortly"),
]
"""Status, title of the page, and its advice."""


def test_error_says_what_happened_and_what_to_do(desk, script):
    for status, title, advice in ERRORS:
        script.failures["/v1/classify"] = (status, f"words of the server at {status}", {})
        ask(desk, task="fpb")
        expect(desk.get_by_role("heading", name=title)).to_be_visible()
        for words in (advice, f"words of the server at {status}", "req-0123456789"):
            expect(desk.locator(".failure")).to_contain_text(words)
        assert desk.get_by_role("button", name="Try again").count() == (1 if status >= 500 else 0)


def test_retry_button_counts_down_after_a_429(desk, script):
    script.failures["/v1/classify"] = (429, "60 requests a minute", {"Retry-After": "2"})
    ask(desk, task="fpb")
    expect(desk.get_by_role("button", name=re.compile("Try again in [12] s"))).to_be_disabled()
    script.failures.clear()
    script.answers["/v1/classify"] = labels({"negative": 0.1, "neutral": 0.2, "positive": 0.7})
    again = desk.get_by_role("button", name="Try again", exact=True)
    expect(again).to_be_enabled()
    again.click()
    expect(desk.locator(".verdict")).to_have_text("positive 70.0 %")


def test_unreachable_server_and_unreadable_answer_are_errors(desk, script):
    script.answers["/v1/classify"] = {"surprise": 1}
    ask(desk, task="fpb")
    expect(desk.locator(".failure")).to_contain_text("The answer could not be read.")
    desk.context.set_offline(True)
    ask(desk)
    expect(desk.locator(".failure")).to_contain_text("The server does not answer.")
    expect(desk.locator("#link")).to_have_text("The server does not answer.")
    expect(desk.locator("#seen")).to_contain_text("as of")

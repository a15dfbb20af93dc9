"""Actions of a user on the web page."""

from __future__ import annotations


def ask(page, text="Profit rose 12 %", task=None, about=None):
    if task is not None:
        page.get_by_label("Task").select_option(task)
    if about is not None:
        page.locator("#about").fill(about)
    page.locator("#text").fill(text)
    page.locator("#text").press("Control+Enter")

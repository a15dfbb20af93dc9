"""Fixtures of serving: a real server on the tiny base, and a headless browser at the page of a fake server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from crashing_stages import make_engine_of
from live_server import Live, live_server, make_adapter, make_settings
from pretend_server import KEY, Script, serving

if TYPE_CHECKING:
    from openai import OpenAI
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Without these switches a browser contacts its maker's servers at each start.
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
WAIT_MS = 10_000


@pytest.fixture
def opened():
    """Cores that the engine opened, the newest last."""
    return []


@pytest.fixture
def make_engine(tiny_base, opened):
    engines = []

    def build(**changes):
        engines.append(make_engine_of(tiny_base, opened, **changes))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def address(script) -> Iterator[str]:
    with serving(script) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: install the package chromium to test the page")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser) -> Iterator[Page]:
    """One tab for all pages of a module: the browser starts two processes for each new one."""
    with browser.new_context() as context:
        yield context.new_page()


@pytest.fixture
def page(tab, address) -> Iterator[Page]:
    """The page before the key is typed. Checks at the end that it had no error and contacted no other server.

    Each test has a server at a port of its own, so an origin of its own: nothing that the tab stored for another is there.
    """
    tab.set_default_timeout(WAIT_MS)
    errors, strangers = [], []
    listeners = {
        "pageerror": lambda error: errors.append(str(error)),
        "console": lambda line: errors.append(line.text) if "Content Security Policy" in line.text else None,
        "request": lambda request: None if request.url.startswith(address) else strangers.append(request.url),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)
    tab.goto(address)
    yield tab
    tab.context.set_offline(False)
    tab.goto("about:blank")  # closes its connections
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    tab.emulate_media(color_scheme="null", reduced_motion="null")
    tab.set_viewport_size({"width": 1280, "height": 720})  # Playwright's default
    assert errors == []
    assert [url for url in strangers if url != "about:blank"] == []


@pytest.fixture
def desk(page) -> Page:
    """The page with the key accepted."""
    page.get_by_label("Key", exact=True).fill(KEY)
    page.get_by_role("button", name="Continue").click()
    page.get_by_label("Model").wait_for()
    return page


@pytest.fixture(scope="session")
def adapters(tiny_base, tmp_path_factory) -> Path:
    """An adapter folder: `good` in two versions, `plain` without, `chatty` for another template, `half` incomplete."""
    folder = tmp_path_factory.mktemp("adapters")
    model = make_settings(tiny_base).model
    for seed, name in enumerate(("good/v1", "good/v2", "plain", "half")):
        make_adapter(model, folder / name, seed)
    make_adapter(model, folder / "chatty", 9, template="chat")
    (folder / "half" / "finlora.yaml").unlink()
    return folder


@pytest.fixture(scope="session")
def live(tiny_base, adapters, tmp_path_factory) -> Iterator[Live]:
    """One server for all tests that only send requests."""
    folder = tmp_path_factory.mktemp("live")
    config = make_settings(tiny_base, adapters_dir=str(adapters), audit_dir=str(folder / "audit"))
    with live_server(config, folder) as live:
        yield live


@pytest.fixture
def client(live) -> Iterator[OpenAI]:
    """OpenAI's own client without retries, which would hide a failure."""
    from openai import OpenAI

    with OpenAI(base_url=f"{live.address}/v1", api_key=live.keys["desk"], max_retries=0, timeout=60) as client:
        yield client

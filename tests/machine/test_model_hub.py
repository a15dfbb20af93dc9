"""The hub is checked once, within seconds, and its client's errors are explained."""

from __future__ import annotations

import http.server
import socket
import threading

import pytest

from finlora.machine import model_hub


@pytest.fixture(autouse=True)
def online(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_hub_that_answers_anything_is_there(monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        server.RequestHandlerClass.log_message = lambda *_: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert model_hub.find_hub_problem() is None
        monkeypatch.setenv("HF_ENDPOINT", f"https://127.0.0.1:{server.server_port}")
        assert model_hub.find_hub_problem().startswith("127.0.0.1 does not answer: ")
        server.shutdown()


def test_silent_hub_is_given_up(monkeypatch):
    """As behind a firewall that drops packets."""
    monkeypatch.setattr(model_hub, "_ANSWER_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert model_hub.find_hub_problem() == "127.0.0.1 does not answer: it is silent for 0.2 s"


def test_hub_is_not_asked_where_that_is_not_wanted(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert model_hub.find_hub_problem() == "127.0.0.1 does not answer: Connection refused"
    for name, value in (("HF_HUB_OFFLINE", "1"), ("https_proxy", "http://p:1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert model_hub.find_hub_problem() is None


class RepositoryNotFoundError(Exception):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError("403"), "its terms are not accepted by the account that is logged in"),
        (RepositoryNotFoundError("404"), "no model of that name, or it is private: check the spelling"),
        (ValueError("x"), "ValueError: copy the model to this machine"),
    ],
)
def test_error_of_the_hubs_client_is_reported(error, words):
    assert words in model_hub.explain_hub(error)


def test_cause_behind_an_error_is_reported():
    error = OSError("not in the cache")
    error.__cause__ = GatedRepoError("403")
    assert model_hub.explain_hub(error).startswith("its terms")

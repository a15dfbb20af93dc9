"""`finlora ask --server` against a real server: the same answers in a terminal, errors with a message and an exit code."""

from __future__ import annotations

import http.server
import re
import threading

import pytest
from wire import send

from finlora.cli.main import main
from finlora.serve.http.client import choose_proxies

TEXT = "Profit rose 12 %"


@pytest.fixture
def ask(live, capsys, monkeypatch):
    """Run the verb; return exit code, standard output and standard error."""
    monkeypatch.setenv("FINLORA_API_KEY", live.keys["desk"])
    for name in ("HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "0")  # main sets them if unset; monkeypatch restores them

    def run(*arguments, server=live.address, model="tiny"):
        options = [*(["--server", server] if server else []), *(["--model", model] if model else [])]
        with pytest.raises(SystemExit) as stop:
            main(["ask", *arguments, *options])
        output = capsys.readouterr()
        return stop.value.code, output.out, output.err

    return run


def test_labels_equal_those_over_http(ask, live):
    code, out, _ = ask(TEXT, "--task", "fpb", model="tiny:good")
    body = {"model": "tiny:good", "task": "fpb", "text": TEXT}
    (result,) = send(live.address, "/v1/classify", live.keys["desk"], body).body["results"]
    assert code == 0
    for label, value in result["probabilities"].items():
        assert label in out
        assert f"{value:.1%}" in out


def test_text_and_extract_are_printed(ask, live):
    code, out, _ = ask(TEXT)
    body = {"model": "tiny", "messages": [{"role": "user", "content": TEXT}]}
    reply = send(live.address, "/v1/chat/completions", live.keys["desk"], body).body
    assert (code, out.strip("\n")) == (0, reply["choices"][0]["message"]["content"].strip("\n"))
    code, out, _ = ask("<a>12</a>", "--task", "xbrl_values", "--about", "How much?")
    assert code == 0
    assert re.search(r"Answer (at characters \d+ to \d+ of|not found in) the text asked about", out)


@pytest.mark.parametrize(
    ("arguments", "options", "code", "words"),
    [
        ((TEXT, "--task", "fpb"), {"model": "other"}, 2, "the server answers 404: there is no model 'other'"),
        ((TEXT, "--task", "ner"), {}, 2, "the server answers 400: found no about for task ner"),
        ((TEXT,), {"model": "tiny:chatty"}, 2, "the server answers 422"),
        ((TEXT,), {"server": "http://127.0.0.1:9"}, 5, "no server answers at http://127.0.0.1:9"),
        ((TEXT,), {"server": "file:///etc"}, 2, "expected an address such as http://127.0.0.1:8000"),
        ((TEXT,), {"server": None}, 2, "--server and --model go together"),
        ((TEXT, "--base"), {}, 2, "--server and --model go together"),
    ],
)
def test_failure_has_a_message_and_an_exit_code(ask, arguments, options, code, words):
    found, _, err = ask(*arguments, **options)
    assert found == code
    assert words in err


def test_missing_and_wrong_keys_are_refused(ask, monkeypatch):
    monkeypatch.setenv("FINLORA_API_KEY", "wrong")
    assert "the API key is not known" in ask(TEXT)[2]
    monkeypatch.delenv("FINLORA_API_KEY")
    code, _, err = ask(TEXT)
    assert (code, "FINLORA_API_KEY is not set" in err) == (2, True)


PROXY = "http://someone:secret@proxy.example:3128"


@pytest.mark.parametrize(
    ("address", "no_proxy", "through"),
    [
        ("http://127.0.0.1:8000", "", None),
        ("http://localhost:8000", "", None),
        ("http://[::1]:8000", "", None),
        ("https://127.0.0.1:8000", "", None),
        ("https://10.1.2.3", "", None),
        ("http://models.example.com", "", None),  # it would read the key
        ("https://models.example.com", "", PROXY),
        ("https://models.example.com", "example.com", None),
    ],
)
def test_no_proxy_that_could_read_the_key_is_used(monkeypatch, address, no_proxy, through):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, PROXY)
    monkeypatch.setenv("no_proxy", no_proxy)
    assert choose_proxies(address).get("https") == through
    assert set(choose_proxies(address)) <= {"https"}


def test_local_server_is_reached_without_the_proxy(ask, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert ask(TEXT, "--task", "fpb", model="tiny:good")[0] == 0


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (
            "http://nosuch.invalid",
            "name nosuch.invalid cannot be resolved): start one with `finlora serve`, or correct --server. h",
        ),
        ("https://nosuch.invalid", "no server answers at https://nosuch.invalid through the proxy 127.0.0.1:9 (["),
    ],
)
def test_errors_name_the_proxy_without_its_password(ask, monkeypatch, address, words):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://someone:secret@127.0.0.1:9")
    code, _, err = ask(TEXT, server=address)
    assert code == 5
    assert words in err
    assert "secret" not in err


def test_server_without_tls_or_of_another_kind_is_an_error(ask, live):
    """https to a server without a certificate, and a web server that is not FinLoRA."""
    code, _, err = ask(TEXT, server=live.address.replace("http://", "https://"))
    assert code == 5
    assert "it does not speak TLS, " in err
    assert "use http:// if the server has no certificate" in err

    class Stranger(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        code, _, err = ask(TEXT, server=address)
        server.shutdown()
    assert (code, err) == (
        2,
        f"Config error: the server at {address} answers 404 without FinLoRA's error format: ask again, or correct --server if it "
        "is another server.\n",
    )

"""Untrusted servers: the key is sent to no other host, control characters are removed, malformed replies are errors."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from finlora.errors import ConfigError, ResourceError
from finlora.serve.http.client import ask_server, read_extract, read_pieces, read_probabilities

KEY = "finlora-desk-" + "k" * 43


@contextmanager
def server(status, headers, body):
    """Answer every request alike; yield the address and the Authorization headers received."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self):
            seen.append(self.headers.get("Authorization"))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        # The default poll interval of 0.5 s would delay the shutdown in each test.
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}", seen
        http.shutdown()
        thread.join()


def ask(address, task=None, key=KEY):
    pieces = []
    reply = ask_server(
        address, key, "tiny", task, "text", "what" if task else None, temperature=0.0, seed=None, on_text=pieces.append
    )
    return reply, "".join(pieces)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_key_does_not_follow_a_redirect(status):
    with (
        server(200, {}, b"{}") as (elsewhere, stolen),
        server(status, {"Location": f"{elsewhere}/v1/x"}, b"") as (address, seen),
    ):
        with pytest.raises(ConfigError, match=f"answers {status} without FinLoRA's error format"):
            ask(address, "fpb")
        assert seen == [f"Bearer {KEY}"]
        assert stolen == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "was cut before the answer was complete"),
        (b"data: {\n\n", "is not FinLoRA's format"),
        (b"data: []\n\n", "is not FinLoRA's format"),
        (b"data: \xff\n\n", "is not FinLoRA's format"),
        (b'data: {"choices": [1]}\n\n', "delta=None"),
        (b'data: {"error": 3}\n\n', "does not say why"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "is not FinLoRA's format"),
        (b"x" * (2**24 + 2), "a stream without an end"),
    ],
)
def test_malformed_stream_is_a_finlora_error(body, words):
    with server(200, {}, body) as (address, _), pytest.raises(ResourceError, match=words):
        ask(address)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"results": []}', b'{"results": [{"probabilities": {"a": 2}}]}'])
def test_malformed_classification_is_a_finlora_error(raw):
    with server(200, {}, raw) as (address, _), pytest.raises(ResourceError, match="is not FinLoRA's format"):
        ask(address, "fpb")
    with pytest.raises(ResourceError, match="is not FinLoRA's format"):
        read_probabilities(raw, "here")
    with pytest.raises(ResourceError, match="is not FinLoRA's format"):
        read_extract(raw, "here")


def test_control_characters_do_not_reach_the_terminal():
    body = b'data: {"choices": [{"delta": {"content": "a\\u001b]0;title\\u0007\\nb\\u009b31m"}}]}\n\ndata: [DONE]\n\n'
    with server(200, {}, body) as (address, _):
        assert ask(address)[1] == "a\ufffd]0;title\ufffd\nb\ufffd31m"
    with server(500, {}, b'{"error": {"message": "\\u001b[2Jgone"}}') as (address, _):
        with pytest.raises(ResourceError) as refused:
            ask(address)
        assert "\x1b" not in str(refused.value)


def test_cut_connection_is_a_finlora_error():
    with (
        server(200, {"Content-Length": "900"}, b'data: {"choices": []}\n\n') as (address, _),
        pytest.raises(ResourceError),
    ):
        ask(address)
    with server(200, {"Transfer-Encoding": "chunked"}, b"zz\r\n") as (address, _), pytest.raises(ResourceError):
        ask(address)


@pytest.mark.parametrize("address", ["http://", "http://[", "http://a:b", "http://127.0.0.1:1 /", "http://me:pw@a"])
def test_malformed_address_is_a_finlora_error(address):
    with pytest.raises(ConfigError, match="expected an address such as"):
        ask(address)


def test_malformed_host_name_is_a_finlora_error():
    with pytest.raises(ResourceError, match="no server answers"):
        ask("http://\udcff")


def test_key_that_no_header_can_hold_is_refused_before_it_is_sent():
    for key in ("a\nb", "schlüssel"):
        with pytest.raises(ConfigError, match="characters that no key has") as refused:
            ask("http://127.0.0.1:9", key=key)
        assert key not in str(refused.value)


def test_pieces_are_equal_however_the_bytes_are_cut():
    body = 'data: {"choices": [{"delta": {"content": "Größe"}}]}\r\n\r\n: still here\n\ndata:[DONE]\n\n'.encode()
    for size in (1, 2, 3, 7, 1000):
        blocks = [body[start : start + size] for start in range(0, len(body), size)]
        assert list(read_pieces(blocks, "here")) == ["Größe"]

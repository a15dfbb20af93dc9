"""Bounds on the cost of one request: bodies with a million faults, incomplete bodies, an unreadable key file."""

from __future__ import annotations

import http.client
import json
import logging
import os
import time

import pytest
from live_server import ADMIN, live_server, make_settings
from wire import send

from finlora.serve.http import guard

ASK = {"model": "tiny", "task": "fpb", "text": "Profit rose"}
MANY = 300_000


@pytest.mark.parametrize(
    ("path", "raw"),
    [
        ("/v1/completions", b'{"model": "tiny", "prompt": [' + b"{}," * MANY + b"{}]}"),
        ("/v1/chat/completions", b'{"model": "tiny", "messages": [' + b"{}," * MANY + b"{}]}"),
        ("/v1/classify", b'{"model": "tiny", "task": "fpb", "texts": [' + b"1," * MANY + b"1]}"),
        ("/v1/classify", b"{" + b",".join(b'"%d":1' % number for number in range(MANY // 3)) + b"}"),
        ("/v1/classify", b'{"model": "tiny", "task": "fpb", "text": "a", "' + b"k" * 10**6 + b'": 1}'),
    ],
)
def test_body_with_many_faults_gets_a_quick_short_answer(live, path, raw):
    """Without bounds, a body of 1.8 MB causes 1.2 million faults, 21 s and 1.4 GB."""
    started = time.process_time()
    reply = send(live.address, path, live.keys["desk"], raw=raw)
    assert (reply.status, len(reply.text) < 5000) == (400, True)
    assert time.process_time() - started < 5


def start(live, headers):
    host, port = live.address.removeprefix("http://").split(":")
    line = http.client.HTTPConnection(host, int(port), timeout=30)
    line.putrequest("POST", "/v1/classify")
    for name, value in {"Content-Type": "application/json", "Content-Length": "100", **headers}.items():
        line.putheader(name, value)
    line.endheaders()
    line.send(b"{")  # and nothing more
    return line


def test_incomplete_body_times_out(live, monkeypatch):
    monkeypatch.setattr(guard, "_BODY_S", 0.5)
    monkeypatch.setattr(guard, "_DRAIN_S", 0.5)
    for headers, status, code in (
        ({"Authorization": f"Bearer {live.keys['desk']}"}, 408, "slow_body"),
        ({}, 401, "missing_api_key"),
    ):
        line = start(live, headers)
        reply = line.getresponse()
        assert (reply.status, json.loads(reply.read())["error"]["code"]) == (status, code)
        line.close()


def test_damaged_key_file_refuses_everyone_without_details(tiny_base, tmp_path, caplog):
    with live_server(make_settings(tiny_base), tmp_path) as live:
        assert send(live.address, "/v1/models", live.keys["desk"]).status == 200
        file = tmp_path / "keys.yaml"
        good = file.read_bytes()
        file.write_bytes(b"- {id: desk, salt: [secret")
        with caplog.at_level(logging.ERROR):
            replies = [send(live.address, "/v1/models", key) for key in (live.keys["desk"], ADMIN, "wrong")]
        assert {(reply.status, reply.error["code"]) for reply in replies} == {(503, "no_keys")}
        assert not any("keys.yaml" in reply.text or "secret" in reply.text for reply in replies)
        assert "keys.yaml" in caplog.text
        assert "secret" not in caplog.text
        assert live.keys["desk"] not in caplog.text
        file.write_bytes(good)
        os.utime(file, ns=(1, 1))
        assert send(live.address, "/v1/models", live.keys["desk"]).status == 200

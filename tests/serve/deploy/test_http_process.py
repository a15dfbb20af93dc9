"""HTTP process at the direct port, here a thread: answers, closes silent connections, logs answers that it cuts off."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from crashing_stages import wait_for
from live_server import ADMIN, CountingMeter, make_settings
from test_direct_port import find_free_port
from wire import send

from finlora.errors import ResourceError
from finlora.serve.accounts.quota import Quota
from finlora.serve.deploy import http_process
from finlora.serve.deploy.http_process import answer_http
from finlora.serve.live.engine_hub import Hub
from finlora.serve.settings import DirectConfig


@pytest.fixture
def hub(make_engine):
    with tempfile.TemporaryDirectory(prefix="fl-") as folder:  # a socket's path must be short
        hub = Hub(make_engine(), Quota(time.monotonic), Path(folder) / "hub")
        hub.start()
        yield hub
        hub.close()


@pytest.fixture
def open_http_process(hub, tiny_base, tmp_path, monkeypatch):
    """Factory of HTTP processes at a direct port; each call returns the address and a function that ends it."""
    monkeypatch.setenv("FINLORA_API_KEY", ADMIN)
    with contextlib.ExitStack() as stack:

        def build(**direct):
            port = find_free_port()
            settings = DirectConfig(port=port, processes=1, **direct)
            config = make_settings(tiny_base, audit_dir=str(tmp_path / "audit"), direct=vars_of(settings))
            opened, closing, loops = asyncio.Event(), asyncio.Event(), []

            async def work():
                loops.append(asyncio.get_running_loop())
                await answer_http(config, hub.path, CountingMeter(), opened, closing)

            thread = threading.Thread(target=lambda: asyncio.run(work()), daemon=True)
            thread.start()
            wait_for(opened.is_set)

            def close():
                with contextlib.suppress(RuntimeError):  # it has ended
                    loops[0].call_soon_threadsafe(closing.set)
                thread.join(timeout=20)
                assert not thread.is_alive()

            stack.callback(close)
            return f"http://127.0.0.1:{port}", close

        yield build


def vars_of(settings):
    return {name: getattr(settings, name) for name in settings.__slots__}


def test_process_answers_until_it_is_closed(open_http_process):
    address, close = open_http_process()
    reply = send(address, "/v1/classify", ADMIN, {"model": "tiny", "task": "fpb", "text": "Profit rose 12 %"})
    assert reply.status == 200
    assert len(reply.body["results"][0]["probabilities"]) == 3
    assert send(address, "/readyz", ADMIN).status == 200
    close()
    with pytest.raises(OSError, match="refused"):
        send(address, "/healthz", None)


def test_silent_connections_are_closed(open_http_process, monkeypatch):
    monkeypatch.setattr(http_process, "_SILENCE_CHECK_S", 0.1)
    address, _ = open_http_process(keep_alive_timeout_s=1)
    port = int(address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as silent, socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        began = time.monotonic()
        for line in (silent, half):
            line.settimeout(10)
            assert line.recv(1) == b""
        assert time.monotonic() - began > 0.8
    assert send(address, "/healthz", None).status == 200


def test_shutdown_cuts_a_slow_answer_off_and_logs_it(open_http_process, opened, monkeypatch, tmp_path):
    monkeypatch.setattr(http_process, "_ANSWER_S", 1)
    address, close = open_http_process()
    body = {"model": "tiny", "prompt": "Profit", "max_tokens": 900, "stream": True}
    headers = {"Authorization": f"Bearer {ADMIN}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert reply.readline().startswith(b"data: {")
        opened[0].executor.is_stuck.set()
        try:
            close()
        finally:
            opened[0].executor.is_stuck.clear()
        with pytest.raises(http.client.IncompleteRead):
            reply.read()
    (log,) = (tmp_path / "audit").iterdir()
    (entry,) = map(json.loads, log.read_text().splitlines())
    assert (entry["path"], entry["outcome"]) == ("/v1/completions", "cancelled")


def test_taken_port_is_refused(hub, tiny_base, monkeypatch):
    monkeypatch.setenv("FINLORA_API_KEY", ADMIN)
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        config = make_settings(tiny_base, direct={"port": stranger.getsockname()[1]})
        work = answer_http(config, hub.path, CountingMeter(), asyncio.Event(), asyncio.Event())
        with pytest.raises(ResourceError, match=r"cannot be opened \(Address already in use\): take a free port"):
            asyncio.run(work)

"""The server at a port of its own, past Ray Serve's proxy: the same guard, the same answers, started by `finlora serve`."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest
import yaml
from certificate import make_certificate
from wire import send

from finlora.errors import ConfigError
from finlora.serve.direct import open_direct_port, require_one_copy

ROOT = Path(__file__).resolve().parents[2]
ASK = {"model": "demo", "task": "fpb", "text": "Profit rose 12 %"}


def find_free_ports():
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@pytest.fixture(scope="module")
def served(tiny_base, tmp_path_factory):
    """(proxy's address, direct address, key, TLS context) of `finlora serve` in a process with a Ray of its own."""
    port, direct_port = find_free_ports()
    key, home = secrets.token_urlsafe(32), tmp_path_factory.mktemp("home")
    certificate = make_certificate(home)
    tree = yaml.safe_load((ROOT / "serve_configs" / "cpu-demo.yaml").read_text())
    tree["http_options"] |= {"ssl_certfile": str(certificate), "ssl_keyfile": str(home / "server.key")}
    (home / "tls.yaml").write_text(yaml.safe_dump(tree))
    with tempfile.TemporaryDirectory(prefix="fl-") as ray_folder:  # a short name: Ray's sockets lie in it
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= {"FINLORA_API_KEY": key, "HOME": str(home), "RAY_TMPDIR": ray_folder, "RAY_USAGE_STATS_ENABLED": "0"}
        command = [sys.executable, "-m", "finlora.cli.main", "serve"]
        command += ["--config", str(home / "tls.yaml"), "--port", str(port)]
        command += ["--direct-port", str(direct_port), f"model.base={tiny_base}", "model.bits=16", "stages.num=1"]
        command += ["adapters_dir=null", "keys_file=null", "audit_dir=null"]
        with (home / "log").open("w") as log:
            server = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        lines = []
        for line in server.stdout:
            lines.append(line)
            if "ends it" in line:
                break
        said = " ".join(" ".join(lines).split())
        assert re.search(
            rf"at https://127.0.0.1:{port} \(page, /v1/...\), and by itself at port {direct_port}", said
        ), said + (home / "log").read_text()
        tls = ssl.create_default_context(cafile=str(certificate))
        yield f"https://127.0.0.1:{port}", f"https://127.0.0.1:{direct_port}", key, tls
        server.send_signal(signal.SIGINT)
        server.stdout.read()
        assert server.wait(timeout=90) == 0, (home / "log").read_text()[-2000:]
        server.stdout.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", direct_port), timeout=5)


@pytest.mark.ray
def test_server_answers_past_the_proxy_as_behind_it(served):
    *addresses, key, tls = served
    answers = []
    for address in addresses:
        refused = send(address, "/v1/classify", None, ASK, tls=tls)
        assert (refused.status, refused.error["code"]) == (401, "missing_api_key")
        reply = send(address, "/v1/classify", key, ASK, tls=tls, headers={"X-Request-Id": "trade-77"})
        assert (reply.status, reply.headers["x-request-id"]) == (200, "trade-77")
        assert send(address, "/v1/models", key, tls=tls).headers["x-request-id"]
        answers.append(reply.body["results"])
    assert answers[0] == answers[1]


@pytest.mark.ray
def test_streams_come_piece_by_piece_past_the_proxy(served):
    _, address, key, tls = served
    body = {"model": "demo", "prompt": "Profit", "max_tokens": 6, "stream": True}
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60, context=tls) as reply:
        lines = [line for line in reply.read().decode().splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 2


def test_what_a_direct_port_cannot_be_is_said(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(
        ConfigError, match=r"direct-port=9000 with RAY_ADDRESS=10.0.0.1:6379: a cluster that runs has its own"
    ):
        open_direct_port(9000)
    with pytest.raises(ConfigError, match=r"direct-port=9000 with num_replicas=4: one port leads to one copy"):
        require_one_copy(9000, 8000, 4)
    with pytest.raises(ConfigError, match=r"direct-port=8000 is the port of Ray Serve's proxy as well"):
        require_one_copy(8000, 8000, 1)
    require_one_copy(9000, 8000, 1)

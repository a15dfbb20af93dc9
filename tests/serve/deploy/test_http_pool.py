"""Direct port past Ray Serve's proxy: the same guard and the same answers, from two HTTP processes."""

from __future__ import annotations

import contextlib
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
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml
from certificate import make_certificate
from wire import send

from finlora.errors import ConfigError, ResourceError
from finlora.serve.deploy import http_pool
from finlora.serve.deploy.serve_yaml import check_server, read_deployment
from finlora.serve.settings import read_settings

ROOT = Path(__file__).resolve().parents[3]
ASK = {"model": "demo", "task": "fpb", "text": "Profit rose 12 %"}


def find_processes(home):
    """Return the processes at the direct port of the server with this home folder."""
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error, IndexError):
            if each.cmdline()[0].startswith("ray::HttpProcess") and each.environ()["HOME"] == str(home):
                found.append(each)
    return found


def open_stream(address, key, tls, num_tokens):
    body = {"model": "demo", "prompt": "Profit", "max_tokens": num_tokens, "stream": True}
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=60, context=tls)


def find_free_ports():
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@pytest.fixture(scope="module")
def served(tiny_base, tmp_path_factory):
    """(proxy's address, direct address, key, TLS context, home folder) of `finlora serve` in a process with a Ray of its own."""
    port, direct_port = find_free_ports()
    key, home = secrets.token_urlsafe(32), tmp_path_factory.mktemp("home")
    certificate = make_certificate(home)
    tree = yaml.safe_load((ROOT / "serve_configs" / "cpu-demo.yaml").read_text())
    tree["http_options"] |= {"ssl_certfile": str(certificate), "ssl_keyfile": str(home / "server.key")}
    (home / "tls.yaml").write_text(yaml.safe_dump(tree))
    with tempfile.TemporaryDirectory(prefix="fl-") as ray_folder:  # a short path, because it holds Ray's sockets
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= {"FINLORA_API_KEY": key, "HOME": str(home), "RAY_TMPDIR": ray_folder, "RAY_USAGE_STATS_ENABLED": "0"}
        command = [sys.executable, "-m", "finlora.cli.main", "serve"]
        command += ["--config", str(home / "tls.yaml"), "--port", str(port)]
        command += ["--direct-port", str(direct_port), f"model.base={tiny_base}", "model.bits=16", "stages.num=1"]
        command += ["adapters_dir=null", "keys_file=null", "audit_dir=null", "model.max_seq_len=2048"]
        with (home / "log").open("w") as log:
            server = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        lines = []
        for line in server.stdout:
            lines.append(line)
            if "ends it" in line:
                break
        said = " ".join(" ".join(lines).split())
        assert re.search(
            rf"at https://127.0.0.1:{port} \(page, /v1/...\), and directly at https://127.0.0.1:{direct_port}", said
        ), said + (home / "log").read_text()
        tls = ssl.create_default_context(cafile=str(certificate))
        yield f"https://127.0.0.1:{port}", f"https://127.0.0.1:{direct_port}", key, tls, home
        # An answer in flight at Ctrl-C is completed.
        with open_stream(f"https://127.0.0.1:{direct_port}", key, tls, 1800) as reply:
            begun = reply.readline()
            server.send_signal(signal.SIGINT)
            lines = [line for line in reply.read().decode().splitlines() if line]
        assert begun.startswith(b"data: {")
        assert lines[-1] == "data: [DONE]", lines[-3:]
        _, _, after = server.stdout.read().partition("Finishing the answers in flight.")
        assert "failed" not in after, after
        assert server.wait(timeout=90) == 0, (home / "log").read_text()[-2000:]
        server.stdout.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", direct_port), timeout=5)


@pytest.mark.ray
def test_answers_past_the_proxy_equal_those_behind_it(served):
    *addresses, key, tls, _ = served
    answers = []
    for address in addresses:
        refused = send(address, "/v1/classify", None, ASK, tls=tls)
        assert (refused.status, refused.error["code"]) == (401, "missing_api_key")
        reply = send(address, "/v1/classify", key, ASK, tls=tls, headers={"X-Request-Id": "trade-77"})
        assert (reply.status, reply.headers["x-request-id"]) == (200, "trade-77")
        assert send(address, "/v1/models", key, tls=tls).headers["x-request-id"]
        answers.append(reply.body["results"])
    (first,), (second,) = answers
    # The second question finds its prompt in the cache: fewer rows, which some processors add in another order.
    assert second.pop("probabilities") == pytest.approx(first.pop("probabilities"), rel=1e-5)
    assert first == second


@pytest.mark.ray
def test_streams_come_in_pieces_past_the_proxy(served):
    _, address, key, tls, _ = served
    with open_stream(address, key, tls, 6) as reply:
        lines = [line for line in reply.read().decode().splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 2


@pytest.mark.ray
def test_crashed_process_restarts_while_the_other_answers(served):
    _, address, key, tls, home = served
    first, second = find_processes(home)
    first.kill()
    first.wait(timeout=10)
    until = time.monotonic() + 60
    while len(now := find_processes(home)) < 2:
        assert second in now
        assert send(address, "/v1/classify", key, ASK, tls=tls).status == 200
        assert time.monotonic() < until
        time.sleep(0.2)
    assert first not in now
    assert {send(address, "/v1/classify", key, ASK, tls=tls).status for _ in range(8)} == {200}


def test_failed_process_restarts_and_repeated_failures_raise(monkeypatch, caplog):
    """Ray is faked: `wait` returns the runs that have ended."""

    class Actor:
        num_runs = 0

        @property
        def run(self):
            return self

        def remote(self):
            self.num_runs += 1
            return f"run {self.num_runs}"

    def get(run):
        raise ResourceError(f"{run}: the disk is full")

    ended = {"first"}
    monkeypatch.setattr(http_pool.ray, "wait", lambda runs, timeout: ([run for run in runs if run in ended], []))
    monkeypatch.setattr(http_pool.ray, "get", get)
    group = object.__new__(http_pool.HttpPool)
    group._actors, group._runs, group._num_failures = [Actor(), Actor()], ["first", "second"], [0, 0]
    group.check()
    assert group._runs == ["run 1", "second"]
    assert "ended and restarts: ResourceError: first: the disk is full" in caplog.text
    group.check()  # it runs, which resets the count
    ended |= {f"run {number}" for number in range(100)}
    for _ in range(9):
        group.check()
    with pytest.raises(RuntimeError, match="ended 10 times"):
        group.check()
    assert group._actors[0].num_runs == 10
    assert group._actors[1].num_runs == 0


@pytest.mark.parametrize(
    ("http", "words"),
    [
        ({"port": 9000}, r"direct.port=9000 is the port of Ray Serve's proxy too: expected another one"),
        (
            {"ssl_ca_certs": "x"},
            r"http_options.ssl_ca_certs guards the proxy, and direct.port=9000 takes only a certificate",
        ),
        ({"ssl_certfile": "/absent", "ssl_keyfile": "/absent"}, r"direct.ssl_certfile=/absent .* cannot be used"),
    ],
)
def test_invalid_direct_port_is_refused_before_anything_starts(tmp_path, tiny_base, monkeypatch, http, words):
    monkeypatch.setenv("FINLORA_API_KEY", secrets.token_urlsafe(32))
    tree = yaml.safe_load((ROOT / "serve_configs" / "cpu-demo.yaml").read_text())
    tree["http_options"] |= http
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    changes = [f"model.base={tiny_base}", "adapters_dir=null", "keys_file=null", "audit_dir=null", "direct.port=9000"]
    with pytest.raises(ConfigError, match=words):
        check_server(read_deployment(tmp_path / "x.yaml", changes), None, None, is_here=True)


def test_settings_of_a_direct_port_are_checked():
    with pytest.raises(
        ConfigError, match=r"(?s)3 settings are wrong.*direct.processes=0.*direct.port=0.*expected both"
    ):
        read_settings({"direct": {"port": 0, "processes": 0, "ssl_certfile": "x"}})

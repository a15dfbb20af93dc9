"""Replies in OpenAI's form before the proxy listens, while no copy is ready, and after the route is gone."""

from __future__ import annotations

import asyncio
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from wire import send

from finlora.errors import ConfigError, ResourceError
from finlora.serve.deploy import start_up
from finlora.serve.deploy.serve_yaml import open_start_up
from finlora.serve.deploy.start_up import ProxyReplies, StartUpDoor, list_middlewares, set_proxy_replies


@pytest.fixture
def http():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"host": "127.0.0.1", "port": probe.getsockname()[1]}


@pytest.fixture
def door(http):
    door = StartUpDoor(http)
    yield door
    door.close()


@pytest.mark.usefixtures("door")
@pytest.mark.parametrize(("path", "body"), [("/v1/models", None), ("/v1/chat/completions", {"a": "b" * 10**6})])
def test_every_request_gets_503_with_retry_after(http, path, body):
    reply = send(f"http://127.0.0.1:{http['port']}", path, "any", body)
    assert (reply.status, reply.headers["retry-after"]) == (503, "5")
    assert (reply.error["type"], reply.error["code"]) == ("service_unavailable_error", "not_ready")


def test_openais_client_waits_and_asks_again(http, door, monkeypatch):
    import openai

    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{http['port']}/v1", api_key="any", max_retries=1)
    with client, pytest.raises(openai.InternalServerError, match="it is starting, ending or full"):
        client.models.list()
    assert 5.0 in slept


def test_another_server_takes_the_port_over_without_a_lost_request(http, door):
    """As the proxy does: it listens beside the door, which then closes."""
    address = f"http://127.0.0.1:{http['port']}"
    with ThreadPoolExecutor(8) as pool, socket.socket() as proxy:
        replies = [pool.submit(send, address, "/v1/models", None) for _ in range(100)]
        proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        proxy.bind(("127.0.0.1", http["port"]))
        assert {reply.result(30).status for reply in replies} == {503}
        door.close()
        door.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", http["port"])).close()


def test_taken_port_is_refused_by_name(http, door):
    deployment = SimpleNamespace(http=http, options={})
    with pytest.raises(ResourceError, match=rf"port={http['port']} at 127.0.0.1 cannot be opened"):
        open_start_up(deployment, None, None)


def ask(app, path="/v1/models"):
    sent = []

    async def receive():
        return {"type": "http.request", "body": b""}

    async def record(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": []}
    asyncio.run(ProxyReplies(app)(scope, receive, record))
    headers = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])


def make_proxy(status, body=b"plain", headers=(), replicas=True, route=True):
    async def app(_scope, _receive, send):
        await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"x-request-id", b"r-1")]})
        await send({"type": "http.response.body", "body": body[:2], "more_body": True})
        await send({"type": "http.response.body", "body": body[2:]})

    handle = SimpleNamespace(running_replicas_populated=lambda: replicas)
    app.proxy_router = SimpleNamespace(match_route=lambda _path: ("/", handle, False) if route else None)
    return app


@pytest.mark.parametrize(
    ("status", "shown", "code"),
    [(404, 503, "not_ready"), (503, 503, "not_ready"), (500, 500, "copy_lost"), (408, 408, "deadline")],
)
def test_the_proxys_own_replies_come_in_openais_form(status, shown, code):
    found, headers, body = ask(make_proxy(status))
    assert (found, json.loads(body)["error"]["code"]) == (shown, code)
    assert headers["x-request-id"] == "r-1"
    assert ("retry-after" in headers) == (code != "deadline")
    assert int(headers["content-length"]) == len(body)


@pytest.mark.parametrize("status", [200, 404])
def test_replies_of_a_copy_pass_unchanged(status):
    reply = ask(make_proxy(status, b"ours", [(b"X-Content-Type-Options", b"nosniff")]))
    assert (reply[0], reply[2]) == (status, b"ours")


def test_refused_preflight_of_a_browser_passes_unchanged():
    """CORS replies come from outside the guard, without its headers."""
    found, _, body = ask(make_proxy(400, b"Disallowed CORS origin"))
    assert (found, body) == (400, b"Disallowed CORS origin")


def test_no_request_waits_for_the_first_copy():
    assert ask(make_proxy(200, replicas=False))[0] == 503
    wrapped = SimpleNamespace(app=make_proxy(200, replicas=False))
    assert start_up._waits_for_copy(wrapped, "/")
    assert ask(make_proxy(200, replicas=False), "/-/healthz")[0] == 200
    assert ask(make_proxy(404, route=False, replicas=False))[0] == 503


@pytest.mark.parametrize(
    ("options", "is_set"),
    [
        ({}, True),
        ({"autoscaling_config": {"min_replicas": 0}}, False),
        ({"autoscaling_config": {"min_replicas": 1}}, True),
    ],
)
def test_a_server_that_starts_with_no_copy_keeps_requests_waiting(monkeypatch, options, is_set):
    from ray._common.utils import import_attr

    monkeypatch.setenv(start_up._CALLBACK, "x")
    monkeypatch.delenv(start_up._CALLBACK)
    set_proxy_replies(options)
    path = start_up.os.environ.get(start_up._CALLBACK)
    assert (path is not None) == is_set
    if path:
        assert import_attr(path) is list_middlewares


def test_metrics_port_is_refused_where_it_does_nothing(monkeypatch):
    from finlora.cluster.connect import require_local_metrics
    from finlora.serve.deploy.replica import build

    with pytest.raises(ConfigError, match=r"metrics_port=9000 holds only under `finlora serve`"):
        build({"metrics_port": 9000})
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="ray start --metrics-export-port"):
        require_local_metrics(9000)

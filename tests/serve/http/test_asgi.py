"""What the application says around its endpoints: pages of other origins, limits of a key, its description."""

from __future__ import annotations

import pytest
from live_server import live_server, make_settings
from wire import send

from finlora.errors import ConfigError

ORIGIN = "https://desk.example"
ASKS = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
BODY = {"model": "tiny", "prompt": "Profit", "max_tokens": 1}


def preflight(address, origin):
    import urllib.error
    import urllib.request

    request = urllib.request.Request(f"{address}/v1/completions", method="OPTIONS", headers={"Origin": origin} | ASKS)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers


def test_page_of_an_allowed_origin_may_ask(tiny_base, tmp_path):
    with live_server(make_settings(tiny_base, allowed_origins=[ORIGIN]), tmp_path) as live:
        status, headers = preflight(live.address, ORIGIN)
        assert (status, headers["access-control-allow-origin"]) == (200, ORIGIN)
        assert "authorization" in headers["access-control-allow-headers"]
        assert preflight(live.address, "https://other.example")[0] == 400
        reply = send(live.address, "/v1/completions", live.keys["slow"], BODY, headers={"Origin": ORIGIN})
        assert reply.headers["access-control-allow-origin"] == ORIGIN
        assert "x-ratelimit-remaining-requests" in reply.headers["access-control-expose-headers"]
        assert reply.headers["x-ratelimit-remaining-requests"] == "2"
        refused = send(live.address, "/v1/completions", None, BODY, headers={"Origin": ORIGIN})
        assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
        for _ in range(3):
            reply = send(live.address, "/v1/completions", live.keys["slow"], BODY)
        assert (reply.status, reply.headers["x-ratelimit-remaining-requests"]) == (429, "0")


def test_other_origins_are_refused_by_default(live):
    status, headers = preflight(live.address, ORIGIN)
    assert (status, headers["access-control-allow-origin"]) == (401, None)


@pytest.mark.parametrize("origin", ["desk.example", "https://desk.example/", "https://*.example"])
def test_origin_with_a_path_is_refused(tiny_base, origin):
    with pytest.raises(ConfigError, match="expected scheme and host without a path"):
        make_settings(tiny_base, allowed_origins=[origin])


def test_description_names_the_key_and_each_reply(live):
    described = send(live.address, "/openapi.json", live.keys["desk"]).body
    assert described["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert described["security"] == [{"key": []}]
    assert described["paths"]["/health"]["get"]["security"] == []
    for path, calls in described["paths"].items():
        for call in calls.values():
            content = call["responses"]["200"].get("content", {})
            kind = "text/plain" if path == "/metrics" else "application/json"
            assert path in ("/health", "/ping") or content[kind]["schema"], path

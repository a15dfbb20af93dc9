"""Guard of every path: keys, limits and request ids; and no body, allowed or forbidden, causes a 5xx."""

from __future__ import annotations

import http.client
import json
import logging
import random

import pytest
from live_server import ADMIN
from wire import send

from finlora.data.sets.catalog import FORMS
from finlora.serve.accounts.audit import hash_text, verify_audit
from finlora.serve.http.finance import _ask

ASK = {"model": "tiny", "task": "fpb", "text": "Profit rose"}


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/stages", "/v1/tasks", "/readyz", "/openapi.json", "/v1/nowhere", "/metrics", "/version"]
)
@pytest.mark.parametrize("key", [None, "wrong", "finlora-desk-" + "a" * 43, ""])
def test_paths_refuse_requests_without_a_known_key(live, path, key):
    reply = send(live.address, path, key)
    assert (reply.status, reply.error["type"]) == (401, "authentication_error")
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("path", ["/healthz", "/health", "/ping", "/docs", "/", "/page/app.js"])
def test_liveness_and_the_page_need_no_key(live, path):
    assert send(live.address, path, None).status == 200


def test_key_and_texts_never_reach_the_log(live, caplog):
    with caplog.at_level(logging.DEBUG):
        reply = send(live.address, "/v1/classify", live.keys["desk"], ASK)
        send(live.address, "/v1/classify", "finlora-desk-" + "s" * 43, ASK)
    assert reply.status == 200
    assert f"{reply.headers['x-request-id']} key=desk POST '/v1/classify' 200" in caplog.text
    assert live.keys["desk"] not in caplog.text
    assert "Profit rose" not in caplog.text
    assert "sss" not in caplog.text


def ask_with_id(live, *ids):
    """Return the status, the request ids and the text of a response."""
    host, port = live.address.removeprefix("http://").split(":")
    line = http.client.HTTPConnection(host, int(port), timeout=30)
    line.putrequest("GET", "/v1/models")
    for name, value in (("Authorization", f"Bearer {live.keys['desk']}"), *(("X-Request-Id", value) for value in ids)):
        line.putheader(name, value)
    line.endheaders()
    reply = line.getresponse()
    text = reply.read().decode()
    line.close()
    return reply.status, [value for name, value in reply.getheaders() if name.lower() == "x-request-id"], text


def test_request_keeps_its_own_id(live, caplog):
    with caplog.at_level(logging.INFO):
        assert ask_with_id(live, "desk-42.a_B")[:2] == (200, ["desk-42.a_B"])
        assert ask_with_id(live, "first", "second")[:2] == (200, ["first"])
    assert "desk-42.a_B key=desk GET '/v1/models' 200" in caplog.text
    for wrong in ("a b", "x" * 65, "é", "a;b"):
        status, ids, text = ask_with_id(live, wrong)
        assert (status, len(ids), ids[0].startswith("req-")) == (400, 1, True)
        assert "expected 1 to 64 letters, digits" in json.loads(text)["error"]["message"]


def test_requests_with_the_same_id_get_their_own_answers(live):
    from concurrent.futures import ThreadPoolExecutor

    def ask(number):
        body = {"model": "tiny", "prompt": f"Profit {number}", "max_tokens": 40}
        return send(live.address, "/v1/completions", live.keys["desk"], body, headers={"X-Request-Id": "same"})

    alone = [ask(number).body["choices"][0]["text"] for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert [reply.body["choices"][0]["text"] for reply in pool.map(ask, range(8))] == alone


def test_requests_beyond_the_minutes_limit_get_429(live):
    replies = [send(live.address, "/v1/classify", live.keys["slow"], ASK) for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 200, 200]
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["2", "1", "0"]
    assert replies[0].headers["x-ratelimit-limit-requests"] == "3"
    reply = send(live.address, "/v1/classify", live.keys["slow"], ASK)
    assert (reply.status, reply.error["code"]) == (429, "rate_limit_exceeded")
    assert "may use 3 requests a minute" in reply.error["message"]
    assert 20 < int(reply.headers["retry-after"]) <= 60
    assert reply.headers["x-ratelimit-remaining-requests"] == "0"
    assert reply.headers["x-ratelimit-reset-requests"] == f"{reply.headers['retry-after']}s"
    free = send(live.address, "/v1/classify", live.keys["desk"], ASK)
    assert not [name for name in free.headers if name.startswith("x-ratelimit")]


def test_body_over_the_limit_is_refused_whole_or_chunked(live):
    large = b'{"model": "' + b"a" * (2 * 2**20) + b'"}'
    reply = send(live.address, "/v1/classify", live.keys["desk"], raw=large)
    assert (reply.status, reply.error["code"]) == (413, "too_large")
    host, port = live.address.removeprefix("http://").split(":")
    line = http.client.HTTPConnection(host, int(port), timeout=30)
    headers = {"Authorization": f"Bearer {live.keys['desk']}", "Content-Type": "application/json"}
    pieces = (large[start : start + 65536] for start in range(0, len(large), 65536))
    line.request("POST", "/v1/classify", body=pieces, headers=headers, encode_chunked=True)
    assert line.getresponse().status == 413
    line.close()


@pytest.mark.parametrize(
    ("raw", "status", "words"),
    [
        (b"{", 400, "We could not parse the JSON body of your request: Expecting property name"),
        (b"[]", 400, "the body is not a JSON object"),
        (b"", 400, "it is empty"),
        (b"\xff\xfe", 400, ""),
        (b'{"model": "tiny", "task": "fpb", "text": "\\ud800"}', 400, "is not Unicode"),
        (b'{"model": "tiny", "task": "fpb", "text": "a", "threshold": NaN}', 400, "threshold"),
        (b'{"model": "tiny", "task": "fpb", "text": "\\u0000 ok"}', 200, ""),
        (b"[" * 100_000, 400, ""),
    ],
)
def test_malformed_body_gets_a_status_and_message(live, raw, status, words):
    reply = send(live.address, "/v1/classify", live.keys["desk"], raw=raw)
    assert reply.status == status, reply.text
    assert words in reply.text


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_body_of_another_content_type_is_refused(live, kind):
    host, port = live.address.removeprefix("http://").split(":")
    line = http.client.HTTPConnection(host, int(port), timeout=30)
    headers = {"Authorization": f"Bearer {live.keys['desk']}"} | ({"Content-Type": kind} if kind else {})
    for path in ("/v1/classify", "/v1/extract", "/v1/completions", "/v1/chat/completions"):
        line.request("POST", path, body=json.dumps(ASK), headers=headers)
        reply = line.getresponse()
        error = json.loads(reply.read())["error"]
        assert (reply.status, error["code"]) == (400, "invalid_content_type")
        assert f"content type {kind!r}" in error["message"] if kind else "content type none" in error["message"]
        assert "`Content-Type: application/json`" in error["message"]
    line.close()


@pytest.mark.parametrize(
    ("body", "code", "param", "message"),
    [
        ({"model": "tiny"}, "missing_required_parameter", "task", "Missing required parameter: 'task'."),
        (ASK | {"txet": 1}, "unknown_parameter", "txet", "Unknown parameter: 'txet'."),
        (ASK | {"model": 1}, "invalid_type", "model", "Invalid type for 'model': input should be a valid string."),
        (ASK | {"threshold": 2}, "invalid_value", "threshold", "Invalid value for 'threshold': input should be less "),
    ],
)
def test_fault_of_a_field_is_named_in_openais_words(live, body, code, param, message):
    error = send(live.address, "/v1/classify", live.keys["desk"], body).error
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"].startswith(message)


def test_wrong_path_and_method_get_openais_error_form(live):
    assert send(live.address, "/v1/nowhere", live.keys["desk"]).error["code"] == "unknown_path"
    reply = send(live.address, "/v1/classify", live.keys["desk"])
    assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"


def test_audit_log_holds_the_hashes_of_each_answer(live):
    reply = send(live.address, "/v1/classify", live.keys["desk"], ASK | {"model": "tiny:good"})
    log = live.server.audit
    line = json.loads(log.path.read_text().splitlines()[-1])
    assert line["request_id"] == reply.headers["x-request-id"] == reply.body["id"]
    assert (line["key_id"], line["model"], line["path"]) == ("desk", "tiny:good", "/v1/classify")
    assert line["base_hash"] == live.server.base.weights_hash
    assert line["adapter_hash"] == live.server.shelf.find("good").hash
    assert line["prompt_hash"] == hash_text(_ask(FORMS, "fpb", ASK["text"], None).prompt)
    assert line["output_hash"] == hash_text(reply.body["results"][0]["label"])
    assert "Profit" not in log.path.read_text()
    assert verify_audit(log.path).head == log.head


def test_metrics_count_answers_and_group_unknown_paths(live):
    send(live.address, "/v1/classify", live.keys["desk"], ASK | {"model": "tiny:good"})
    send(live.address, "/some/path", live.keys["desk"])
    adapter, outcome, prompt, _cached, new, first_s, _ = live.meter.answers[-1]
    assert (adapter, outcome, new) == ("good", "choice", 0)
    assert prompt > 20
    assert 0 < first_s < 60
    assert ("/v1/classify", 200) in live.meter.requests
    assert live.meter.requests[-1] == ("other", 404)
    live.wait_for(lambda: live.meter.shown and live.meter.shown[-1][1])


def test_stages_and_readiness_are_reported(live):
    stages = send(live.address, "/v1/stages", live.keys["desk"]).body
    assert [stage["layers"] for stage in stages["stages"]] == [[0, 0], [1, 1]]
    assert (stages["kv_total"], stages["losses"], stages["repairs"], stages["recovery_s"]) == (1024, 0, 0, None)
    ready = send(live.address, "/readyz", live.keys["desk"])
    assert (ready.status, ready.body["status"]) == (200, "ready")


def test_only_an_admin_key_rolls_a_version_back(live):
    def label():
        asked = ASK | {"model": "tiny:good"}
        return send(live.address, "/v1/classify", live.keys["desk"], asked).body["results"][0]["probabilities"]

    newest = label()
    path = "/v1/adapters/good/version"
    assert send(live.address, path, live.keys["desk"], {"version": "v1"}).status == 403
    assert send(live.address, path, ADMIN, {"version": "v7"}).status == 422
    try:
        reply = send(live.address, path, ADMIN, {"version": "v1"})
        assert (reply.status, reply.body["current"]) == (200, "v1")
        assert label() != newest
    finally:
        assert send(live.address, path, ADMIN, {"version": None}).body["current"] == "v2"
    assert label() == newest
    listed = {a["name"]: a for a in send(live.address, "/v1/adapters", ADMIN).body["data"]}
    assert listed["good"]["versions"] == ["v1", "v2"]
    assert "trained with chat" in listed["chatty"]["refused"]


def test_generated_bodies_never_cause_a_5xx(live):
    """Seeded values of every type in every field of the OpenAPI description, allowed and forbidden ones."""
    schemas = send(live.address, "/openapi.json", ADMIN).body["components"]["schemas"]
    values = [
        None,
        True,
        0,
        -1,
        1,
        3,
        1e308,
        0.5,
        "",
        "tiny",
        "fpb",
        "\U0001f600" * 9,
        [],
        ["a"],
        [1],
        {},
        [[]],
        {"a": 1},
    ]
    dice = random.Random(5)
    paths = {
        "/v1/chat/completions": ("ChatRequest", {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}),
        "/v1/completions": ("CompletionRequest", {"model": "tiny", "prompt": "a"}),
        "/v1/classify": ("ClassifyRequest", {"model": "tiny", "task": "fpb", "text": "a"}),
        "/v1/extract": ("ExtractRequest", {"model": "tiny", "task": "xbrl_tags", "context": "a", "question": "b"}),
        "/v1/adapters/good/version": ("VersionRequest", {"version": None}),
    }
    seen = set()
    for path, (name, good) in paths.items():
        fields = list(schemas[name]["properties"])
        for _ in range(60):
            changes = {
                field: dice.choice(values) for field in dice.sample(fields, min(len(fields), dice.randint(1, 3)))
            }
            reply = send(
                live.address, path, ADMIN, {"max_tokens": 2} | good | changes if "model" in good else good | changes
            )
            assert reply.status < 500, (path, changes, reply.text)
            seen.add(reply.status)
    send(live.address, "/v1/adapters/good/version", ADMIN, {"version": None})
    assert seen >= {200, 400}


def test_metrics_need_an_admin_key(live, monkeypatch):
    assert send(live.address, "/metrics", None).status == 401
    assert send(live.address, "/metrics", live.keys["desk"]).error["code"] == "not_admin"
    assert send(live.address, "/metrics", ADMIN).error["code"] == "no_metrics"
    monkeypatch.setattr(live.server, "metrics_address", f"{live.address}/healthz")  # any page that needs no key
    reply = send(live.address, "/metrics", ADMIN)
    assert (reply.status, reply.text) == (200, '{"status":"alive"}')
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    monkeypatch.setattr(live.server, "metrics_address", "http://127.0.0.1:9/metrics")
    assert send(live.address, "/metrics", ADMIN).status == 503

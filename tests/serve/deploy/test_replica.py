"""CPU demo's Serve YAML on Ray Serve with two stage actors: answers, cancellation, a stage crash and its recovery."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from certificate import make_certificate
from made_facts import write_reference
from wire import send

from finlora.serve.accounts.audit import list_logs, verify_audit
from finlora.serve.accounts.keys import add_key
from finlora.serve.deploy.serve_yaml import read_deployment
from finlora.serve.settings import make_absolute, to_args

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[3]
ASK = {"model": "demo", "task": "fpb", "text": "Profit rose 12 %"}


@pytest.fixture(scope="module")
def home(tiny_base, adapters, tmp_path_factory):
    """The demo's folders, with the tiny base in them."""
    home = tmp_path_factory.mktemp("demo")
    shutil.copytree(tiny_base, home / ".demo" / "base")
    shutil.copytree(adapters, home / ".demo" / "adapters")
    return home


@pytest.fixture(scope="module")
def deployed(home, ray_instance):
    """(address, key, TLS context) of the deployment."""
    from ray import serve

    from finlora.serve.deploy.replica import ServerDeployment

    limits = {"adapters": None, "requests_per_minute": None, "tokens_per_minute": None}
    key = add_key(home / ".demo" / "keys.yaml", "desk", is_admin=True, **limits)
    certificate = make_certificate(home)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        deployment = read_deployment(
            ROOT / "serve_configs" / "cpu-demo.yaml", ["model.compute_dtype=float32", "model.bits=16"]
        )
        settings = make_absolute(deployment.settings)
    http = deployment.http | {"port": port, "ssl_certfile": str(certificate), "ssl_keyfile": str(home / "server.key")}
    serve.start(http_options=http, proxy_location=deployment.proxy_location)
    application = ServerDeployment.options(**deployment.options).bind(to_args(settings))
    route = {"name": deployment.name, "route_prefix": deployment.route_prefix}
    serve.run(application, **route, logging_config=deployment.logging)
    yield f"https://127.0.0.1:{port}", key, ssl.create_default_context(cafile=str(certificate))
    serve.shutdown()


@pytest.fixture
def ask(deployed):
    address, key, tls = deployed
    return lambda path, body=None, key=key: send(address, path, key, body, tls=tls)


def stage_pids():
    import ray
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address
    actors = list_actors(address=address, detail=True, filters=[("state", "=", "ALIVE")])
    return [actor.pid for actor in actors if actor.class_name == "StageActor"]


def test_openai_client_and_financial_endpoints_work_behind_ray_serve(deployed, ask):
    from openai import AuthenticationError, DefaultHttpxClient, OpenAI

    address, key, tls = deployed
    with OpenAI(
        base_url=f"{address}/v1", api_key=key, max_retries=0, http_client=DefaultHttpxClient(verify=tls)
    ) as client:
        asked = {"model": "demo:good", "messages": [{"role": "user", "content": "Profit"}], "max_tokens": 8}
        whole = client.chat.completions.create(**asked).choices[0].message.content
        events = list(client.chat.completions.create(**asked, stream=True))
        assert "".join(event.choices[0].delta.content or "" for event in events) == whole
        with pytest.raises(AuthenticationError, match="the API key is not known"):
            client.with_options(api_key="finlora-desk-" + "a" * 43).models.list()
    labels = ask("/v1/classify", ASK).body["results"][0]["probabilities"]
    assert sum(labels.values()) == pytest.approx(1)
    assert ask("/readyz").status == ask("/healthz", key=None).status == 200
    assert len(ask("/v1/stages").body["stages"]) == 2


def test_request_id_is_equal_in_response_and_audit_log(home, deployed):
    import ray

    address, key, tls = deployed
    host, port = address.removeprefix("https://").split(":")

    def ask(headers):
        line = http.client.HTTPSConnection(host, int(port), timeout=60, context=tls)
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", **headers}
        line.request("POST", "/v1/classify", json.dumps(ASK), headers)
        reply = line.getresponse()
        body = json.loads(reply.read())
        line.close()
        return reply.status, [value for name, value in reply.getheaders() if name.lower() == "x-request-id"], body

    (log,) = list_logs(home / ".demo" / "audit")
    for headers in ({}, {"X-Request-Id": "trade-77"}):
        status, ids, body = ask(headers)
        assert (status, ids) == (200, [body["id"]])
        assert json.loads(log.read_text().splitlines()[-1])["request_id"] == body["id"]
    assert body["id"] == "trade-77"
    logs = Path(ray.worker.global_worker.node.get_logs_dir_path(), "serve").glob("replica_finlora_Server_*.log")
    lines = [line for path in logs for line in path.read_text().splitlines() if "trade-77" in line]
    assert len(lines) == 1, "the YAML turns off Ray Serve's own line for each request"
    assert "trade-77 key=desk POST '/v1/classify' 200" in lines[0]
    status, ids, body = ask({"X-Request-Id": "no good"})
    assert (status, len(ids), body["error"]["code"]) == (400, 1, "invalid_request_id")


def test_requests_without_tls_or_trust_fail(deployed):
    address, key, _ = deployed
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        send(address, "/healthz", None, tls=ssl.create_default_context())
    with pytest.raises((urllib.error.URLError, OSError)):
        send(address.replace("https", "http"), "/v1/models", key)


def test_cluster_accepts_a_deployment_only_with_its_token(deployed):
    """The API of `serve deploy` needs the cluster's token; a key of the server does not open it."""
    import ray

    path = f"http://{ray.worker.global_worker.node.address_info['webui_url']}/api/serve/applications/"
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    for shown in (None, deployed[1], "wrong"):
        request = urllib.request.Request(path, headers={"Authorization": f"Bearer {shown}"} if shown else {})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=20)
        assert refused.value.code in (401, 403)
        refused.value.close()
    request = urllib.request.Request(path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=20) as reply:
        assert '"finlora"' in reply.read().decode()


def test_closed_stream_frees_its_cache_rows_behind_the_proxy(deployed, ask):
    from openai import DefaultHttpxClient, OpenAI

    def wait_for(is_so):
        until = time.monotonic() + 20
        while not is_so(stages := ask("/v1/stages").body):
            assert time.monotonic() < until, stages
            time.sleep(0.05)

    address, key, tls = deployed
    with OpenAI(base_url=f"{address}/v1", api_key=key, http_client=DefaultHttpxClient(verify=tls)) as client:
        streams = [
            client.completions.create(model="demo", prompt=f"Profit {n}", max_tokens=480, stream=True) for n in range(8)
        ]
        wait_for(lambda stages: stages["kv_used"] > 8 * 480)
        started = time.monotonic()
        for stream in streams:
            stream.close()
        wait_for(lambda stages: stages["kv_used"] == stages["active"] == 0)
        assert time.monotonic() - started < 3, "the requests ran to their end"


def test_stage_crash_gives_503_at_once_and_recovers(ask):
    """Requests in flight complete or end with a retriable error, none hangs; after recovery the answers are the same."""
    before = ask("/v1/classify", ASK | {"model": "demo:good"}).body["results"]
    pids = stage_pids()
    long = {"model": "demo", "prompt": "Profit rose", "max_tokens": 480}
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(ask, "/v1/completions", long) for _ in range(8)]
        time.sleep(0.3)
        os.kill(pids[1], signal.SIGKILL)
        killed = time.monotonic()
        replies = [future.result(timeout=30) for future in waiting]
        assert {reply.status for reply in replies} <= {200, 503}
        lost = [reply for reply in replies if reply.status == 503]
        assert lost
        assert {reply.error["code"] for reply in lost} == {"stage_lost"}
        assert {reply.headers["retry-after"] for reply in lost} == {"5"}
    refused = ask("/v1/classify", ASK)
    assert (refused.status, time.monotonic() - killed < 10) == (503, True)
    assert ask("/readyz").status == 503
    assert ask("/healthz", key=None).status == 200
    while ask("/readyz").status != 200:
        assert time.monotonic() - killed < 90
        time.sleep(0.2)
    assert "good" in {a["name"] for a in ask("/v1/adapters").body["data"] if a.get("loaded")}
    after = ask("/v1/classify", ASK | {"model": "demo:good"}).body["results"]
    assert after[0]["probabilities"] == pytest.approx(before[0]["probabilities"], rel=1e-4)
    stages = ask("/v1/stages").body
    assert (stages["losses"], stages["repairs"]) == (1, 1)
    assert 0 < stages["recovery_s"] < 90
    living = stage_pids()
    assert len(living) == 2
    assert set(living) & set(pids) == {pids[0]}, "the other stage was restarted too"


def test_metrics_are_in_rays_endpoint(home, ask, tmp_path):
    import ray

    folder = home / ".demo" / "adapters" / "plain"
    write_reference(folder, tmp_path / "results.jsonl", "fpb", ["negative", "neutral", "positive"], [20, 100, 80])
    ask("/v1/classify", ASK | {"model": "demo:plain", "texts": [ASK["text"]] * 120, "text": None})
    ask("/v1/classify", ASK | {"threshold": 1})
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    wanted = {
        "finlora_time_to_first_token_seconds_count",
        "finlora_kv_cache_rows",
        "finlora_stage_busy_ratio",
        "finlora_ready",
        "finlora_stage_repairs",
        "finlora_labels_total{",
        "finlora_label_abstentions_total",
        "finlora_label_calibrated_probability_total",
        "finlora_label_top_probability_bucket",
        "finlora_label_psi{",
        "finlora_label_psi_by_chance",
        "finlora_label_abstention_ratio",
        "finlora_label_tested_abstention_ratio",
        "finlora_label_estimated_accuracy",
        "finlora_label_tested_accuracy",
        "finlora_label_tested_ratio",
        "finlora_label_window_answers",
        "finlora_label_reference_answers",
    }
    until = time.monotonic() + 30
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        missing = {name for name in wanted if f"ray_{name}" not in text}
        if not missing:
            break
        assert time.monotonic() < until, missing
        time.sleep(0.5)

    def values(name, adapter="plain"):
        lines = re.findall(rf"^ray_{name}\{{(.*)\}} (\S+)$", text, flags=re.MULTILINE)
        return [float(value) for tags, value in lines if {f'adapter="{adapter}"', 'task="fpb"'} <= set(tags.split(","))]

    assert sum(values("finlora_labels_total")) == 120
    assert sum(values("finlora_label_top_probability_count")) == 120
    assert values("finlora_label_reference_answers") == [200]
    assert values("finlora_label_reference_answers", "base") == [0]
    assert sorted(values("finlora_label_tested_ratio")) == [0.1, 0.4, 0.5]
    assert values("finlora_label_psi")[0] > 0.2
    assert values("finlora_label_psi", "base") == []
    assert "Profit" not in text


def test_audit_chain_is_intact(home, ask):
    ask("/v1/classify", ASK)
    (log,) = list_logs(home / ".demo" / "audit")
    assert verify_audit(log).count >= 3
    assert "Profit" not in log.read_text()


def test_answer_in_flight_completes_before_shutdown(deployed, ask):
    """Must run last, because it deletes the deployment."""
    from openai import DefaultHttpxClient, OpenAI
    from ray import serve

    address, key, tls = deployed
    asked = {"model": "demo", "prompt": "Profit rose 12 %", "max_tokens": 480}
    with OpenAI(
        base_url=f"{address}/v1", api_key=key, max_retries=0, http_client=DefaultHttpxClient(verify=tls)
    ) as client:
        whole = client.completions.create(**asked).choices[0]
        events = iter(client.completions.create(**asked, stream=True))
        pieces = [next(events)]
        with ThreadPoolExecutor(1) as pool:
            gone = pool.submit(serve.delete, "finlora")
            pieces += list(events)
            gone.result(timeout=60)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.text
    assert pieces[-1].choices[0].finish_reason == whole.finish_reason
    assert ask("/healthz", key=None).status in (404, 503)
    assert stage_pids() == []

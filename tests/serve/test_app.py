"""The CPU demo's own YAML, deployed on Ray Serve with two stage actors: asked, hung up on, killed, and up again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from wire import send

from finlora.serve.audit import list_logs, verify_audit
from finlora.serve.deploy import read_deployment
from finlora.serve.keys import add_key
from finlora.serve.settings import make_absolute, to_args

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
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
    """(address, key) of the deployment."""
    from ray import serve

    from finlora.serve.app import ServerDeployment

    limits = {"adapters": None, "requests_per_minute": None, "tokens_per_minute": None}
    key = add_key(home / ".demo" / "keys.yaml", "desk", is_admin=True, **limits)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        deployment = read_deployment(
            ROOT / "serve_configs" / "cpu-demo.yaml", ["model.compute_dtype=float32", "model.bits=16"]
        )
        settings = make_absolute(deployment.settings)
    serve.start(http_options=deployment.http | {"port": port}, proxy_location=deployment.proxy_location)
    application = ServerDeployment.options(**deployment.options).bind(to_args(settings))
    serve.run(application, name=deployment.name, route_prefix=deployment.route_prefix)
    yield f"http://127.0.0.1:{port}", key
    serve.shutdown()


@pytest.fixture
def ask(deployed):
    address, key = deployed
    return lambda path, body=None, key=key: send(address, path, key, body)


def stage_pids():
    import ray
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address
    actors = list_actors(address=address, detail=True, filters=[("state", "=", "ALIVE")])
    return [actor.pid for actor in actors if actor.class_name == "_StageActor"]


def test_openai_client_and_financial_paths_answer_through_serve(deployed, ask):
    from openai import AuthenticationError, OpenAI

    address, key = deployed
    with OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client:
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


def test_hung_up_stream_frees_its_rows_behind_the_proxy(deployed, ask):
    from openai import OpenAI

    def wait_for(is_so):
        until = time.monotonic() + 20
        while not is_so(stages := ask("/v1/stages").body):
            assert time.monotonic() < until, stages
            time.sleep(0.05)

    address, key = deployed
    with OpenAI(base_url=f"{address}/v1", api_key=key) as client:
        streams = [
            client.completions.create(model="demo", prompt=f"Profit {n}", max_tokens=480, stream=True) for n in range(8)
        ]
        wait_for(lambda stages: stages["kv_used"] > 8 * 480)
        started = time.monotonic()
        for stream in streams:
            stream.close()
        wait_for(lambda stages: stages["kv_used"] == stages["active"] == 0)
        assert time.monotonic() - started < 3, "they went on to their end"


def test_dead_stage_gives_503_at_once_and_serves_again(ask):
    """Requests under way end in order or with a retriable error, none hangs; afterwards answers are as before."""
    before = ask("/v1/classify", ASK).body["results"]
    long = {"model": "demo", "prompt": "Profit rose", "max_tokens": 480}
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(ask, "/v1/completions", long) for _ in range(8)]
        time.sleep(0.3)
        os.kill(stage_pids()[1], signal.SIGKILL)
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
    after = ask("/v1/classify", ASK).body["results"]
    assert after[0]["probabilities"] == pytest.approx(before[0]["probabilities"], rel=1e-4)
    stages = ask("/v1/stages").body
    assert stages["losses"] == 1
    assert 0 < stages["recovery_s"] < 90
    assert len(stage_pids()) == 2


def test_metrics_stand_in_rays_endpoint(ask):
    import urllib.request

    import ray

    ask("/v1/classify", ASK)
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    wanted = {
        "finlora_time_to_first_token_seconds_count",
        "finlora_kv_cache_rows",
        "finlora_stage_busy_ratio",
        "finlora_ready",
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


def test_audit_log_is_whole(home, ask):
    ask("/v1/classify", ASK)
    (log,) = list_logs(home / ".demo" / "audit")
    count, _ = verify_audit(log)
    assert count >= 3
    assert "Profit" not in log.read_text()

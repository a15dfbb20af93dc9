"""Ray's token, end to end: a real head admits drivers, jobs and dashboard requests with the token, and no others."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.chaos.nodes import local_nodes
from tests.chaos.nodes.local_nodes import ROOT, LocalNodes

JOIN = "from finlora.cluster import connect; connect.connect(False); import ray; print('IN', len(ray.nodes()))"
SECRET = "finlora-desk-" + "s" * 43


@pytest.fixture(scope="module")
def nodes():
    nodes = LocalNodes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_nodes, "_START_SECONDS", 240.0)  # on a busy machine
        try:
            nodes.start_head()
            yield nodes
        finally:
            nodes.close()


def client(nodes, **changes):
    address = {"RAY_ADDRESS": f"127.0.0.1:{nodes.port}", "PYTHONPATH": str(ROOT), "FINLORA_API_KEY": SECRET}
    return {"env": nodes.environment | address | changes, "timeout": 240}


def strangers(nodes):
    (nodes.folder / "wrong").write_text("f" * 64)
    hasty = {"RAY_NUM_REDIS_GET_RETRIES": "5"}  # a driver retries once a second, 20 times by default
    return {
        "no token": hasty | {"RAY_AUTH_MODE": "disabled"},
        "wrong token": hasty | {"RAY_AUTH_TOKEN_PATH": str(nodes.folder / "wrong")},
    }


def submit(nodes, *command, **changes):
    settings = client(nodes, **changes)
    settings["env"] = {name: value for name, value in settings["env"].items() if name != "RAY_ADDRESS"}
    return nodes.run("ray", "job", "submit", "--address", nodes.dashboard, *command, **settings)


def as_strangers(nodes, command):
    """Run a command as each stranger, both at once, since they mostly sleep between retries."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda changes: command(nodes, **changes), strangers(nodes).values()))


def join(nodes, **changes):
    return nodes.run(sys.executable, "-c", JOIN, **client(nodes, **changes))


def submit_one(nodes, **changes):
    return submit(nodes, "--no-wait", "--", "python", "-c", "print(1)", **changes)


def test_driver_joins_with_the_token_alone(nodes):
    for refused in as_strangers(nodes, join):
        assert refused.returncode != 0
        assert "IN" not in refused.stdout
        assert "asks for its token" in " ".join(refused.stderr.split())
    joined = join(nodes)
    assert "IN 1" in joined.stdout, joined.stderr


def test_job_is_taken_with_the_token_alone_and_holds_no_secret(nodes):
    for refused in as_strangers(nodes, submit_one):
        assert refused.returncode != 0
        assert "token" in (refused.stdout + refused.stderr).lower()
    done = submit(nodes, "--submission-id", "of-the-test", "--", "python", "-c", "print('from', 'inside')")
    assert (done.returncode, "from inside" in done.stdout) == (0, True), done.stderr
    token = (nodes.folder / "token").read_text()
    told = ask(nodes, "/api/jobs/", token) + ask(nodes, "/api/jobs/of-the-test/logs", token)
    assert "of-the-test" in told
    assert SECRET not in told
    assert token not in told
    logs = [
        path
        for path in (nodes.folder / "head").rglob("*")
        if path.is_file() and path.suffix in (".log", ".out", ".err")
    ]
    assert len(logs) > 5
    for path in [*logs, nodes.folder / "head.log"]:
        text = path.read_text(errors="replace")
        assert token not in text, path
        assert SECRET not in text, path


def ask(nodes, path, token):
    request = urllib.request.Request(nodes.dashboard + path)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=60) as reply:
        return reply.read().decode()


@pytest.mark.parametrize(
    "path", ["/api/jobs/", "/nodes?view=summary", "/api/cluster_status", "/api/serve/applications/"]
)
@pytest.mark.parametrize("token", [None, "f" * 64, ""])
def test_dashboard_answers_nobody_without_the_token(nodes, path, token):
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(nodes, path, token)
    with refused.value as error:
        assert error.code in (401, 403)


def test_no_process_of_the_cluster_has_a_token_on_its_command_line(nodes):
    token = (nodes.folder / "token").read_text()
    root = psutil.Process(nodes.processes["head"].pid)
    lines = [" ".join(process.cmdline()) for process in [root, *root.children(recursive=True)] if process.is_running()]
    assert len(lines) > 3
    assert not any(token in line for line in lines)

"""Ray's token, end to end: a real head of this test's own lets in who has the token, and nobody else, by any door."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

import local_nodes
import psutil
import pytest
from local_nodes import ROOT, LocalNodes

JOIN = "from finlora import cluster; cluster.connect(False); import ray; print('IN', len(ray.nodes()))"
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
    (nodes.folder / "wrong").write_text("f" * 64)
    address = {"RAY_ADDRESS": f"127.0.0.1:{nodes.port}", "PYTHONPATH": str(ROOT), "FINLORA_API_KEY": SECRET}
    return {"env": nodes.environment | address | changes, "timeout": 240}


def strangers(nodes):
    return {
        "no token": {"RAY_AUTH_MODE": "disabled"},
        "wrong token": {"RAY_AUTH_TOKEN_PATH": str(nodes.folder / "wrong")},
    }


def submit(nodes, *command, **changes):
    settings = client(nodes, **changes)
    settings["env"] = {name: value for name, value in settings["env"].items() if name != "RAY_ADDRESS"}
    return nodes.run("ray", "job", "submit", "--address", nodes.dashboard, *command, **settings)


def test_driver_joins_with_the_token_alone(nodes):
    for changes in strangers(nodes).values():
        refused = nodes.run(sys.executable, "-c", JOIN, **client(nodes, **changes))
        assert refused.returncode != 0
        assert "IN" not in refused.stdout
        assert "mend the address or the token" in " ".join(refused.stderr.split())
    joined = nodes.run(sys.executable, "-c", JOIN, **client(nodes))
    assert "IN 1" in joined.stdout, joined.stderr


def test_job_is_taken_with_the_token_alone_and_holds_no_secret(nodes):
    for changes in strangers(nodes).values():
        refused = submit(nodes, "--no-wait", "--", "python", "-c", "print(1)", **changes)
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

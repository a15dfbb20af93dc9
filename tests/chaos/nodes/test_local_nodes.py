"""Nodes started by the commands of the systemd units: join by token, attribution of resources to jobs, kill and clean-up."""

from __future__ import annotations

import os
import sys
import time

import psutil

from tests.chaos.nodes.local_nodes import LocalNodes

NODES = "import ray; ray.init(logging_level='ERROR'); print(sorted(n['Alive'] for n in ray.nodes()), ray.cluster_resources())"

HOLD = (
    "import ray, time; from finlora.cluster.lease import take_lease; ray.init(); "
    "lease = take_lease([{'CPU': 2.0}], 30.0, print, 'night-training'); lease.__enter__(); time.sleep(600)"
)
ASK = (
    "import ray, time; from finlora.cluster.lease import describe_shortage; ray.init(logging_level='ERROR')\n"
    "while not (said := describe_shortage([{'CPU': 2.0}])): time.sleep(0.5)\n"
    "print(said)"
)


def test_units_make_a_cluster_that_a_node_joins_and_leaves():
    nodes = LocalNodes()
    # A node counts as dead after five missed health checks of the head, by default 3 s apart.
    nodes.environment["RAY_health_check_period_ms"] = "500"
    try:
        nodes.start_head()
        nodes.start_node("a", 3)
        deadline = time.monotonic() + 60
        here = {"env": nodes.environment | {"RAY_ADDRESS": f"127.0.0.1:{nodes.port}"}, "cwd": nodes.folder}
        while "'CPU': 3.0" not in (done := nodes.run(sys.executable, "-c", NODES, **here)).stdout:
            assert time.monotonic() < deadline, done.stdout + done.stderr
        assert done.stdout.startswith("[True, True]")

        options = ("--address", nodes.dashboard, "--submission-id", "of-anna", "--no-wait")
        submitted = nodes.run("ray", "job", "submit", *options, "--", "python", "-c", HOLD)
        assert submitted.returncode == 0, submitted.stderr
        said = nodes.run(sys.executable, "-c", ASK, **here, timeout=60).stdout
        assert "2 CPU wanted, 1 of 3 free; held: 2 by night-training (job of-anna: python -c " in said

        (nodes.folder / "wrong").write_text("f" * 64)
        stranger = {"env": nodes.environment | {"RAY_AUTH_TOKEN_PATH": str(nodes.folder / "wrong")}}
        refused = nodes.run("ray", "job", "list", "--address", nodes.dashboard, **stranger)
        assert refused.returncode != 0
        assert "authentication" in (refused.stdout + refused.stderr).lower()

        assert nodes.kill_node("a") > 3
        deadline = time.monotonic() + 60
        while not (done := nodes.run(sys.executable, "-c", NODES, **here)).stdout.startswith("[False, True]"):
            assert time.monotonic() < deadline, done.stdout + done.stderr
    finally:
        nodes.close()
    assert not nodes.folder.exists()
    left = [
        process for process in psutil.process_iter(["cmdline"]) if str(nodes.folder) in str(process.info["cmdline"])
    ]
    assert left == []
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ or str(nodes.folder) not in os.environ["RAY_AUTH_TOKEN_PATH"]

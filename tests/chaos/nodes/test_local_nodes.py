"""Nodes started by the commands of the systemd units: join, attribution of resources to jobs, kill and clean-up.

That nobody joins without the token: tests/deployment/test_ray_token.py.
"""

from __future__ import annotations

import os
import sys

import psutil

from tests.chaos.nodes.local_nodes import LocalNodes

# A driver that ends once the nodes' states and the cluster's CPUs are as expected.
WAIT = (
    "import ray, time; ray.init(logging_level='ERROR')\n"
    "def look(): return sorted(n['Alive'] for n in ray.nodes()), ray.cluster_resources().get('CPU', 0)\n"
    "while look() != {}: time.sleep(0.1)"
)

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
        joined = {"RAY_ADDRESS": f"127.0.0.1:{nodes.port}"}
        here = {"env": nodes.environment | joined, "cwd": nodes.folder, "timeout": 240}  # on a busy machine
        both = nodes.run(sys.executable, "-c", WAIT.format(([True, True], 3.0)), **here)
        assert both.returncode == 0, both.stderr

        options = ("--address", nodes.dashboard, "--submission-id", "of-anna", "--no-wait")
        submitted = nodes.run("ray", "job", "submit", *options, "--", "python", "-c", HOLD)
        assert submitted.returncode == 0, submitted.stderr
        said = nodes.run(sys.executable, "-c", ASK, **here).stdout
        assert "2 CPU wanted, 1 of 3 free; held: 2 by night-training (job of-anna: python -c " in said

        assert nodes.kill_node("a") > 3
        one = nodes.run(sys.executable, "-c", WAIT.format(([False, True], 0)), **here)
        assert one.returncode == 0, one.stderr
    finally:
        nodes.close()
    assert not nodes.folder.exists()
    left = [
        process for process in psutil.process_iter(["cmdline"]) if str(nodes.folder) in str(process.info["cmdline"])
    ]
    assert left == []
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ or str(nodes.folder) not in os.environ["RAY_AUTH_TOKEN_PATH"]

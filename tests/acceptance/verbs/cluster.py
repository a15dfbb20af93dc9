"""Ray cluster that the steps share, started as the documents say, so that no command starts its own."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

from acceptance.processes import Process
from acceptance.walk import ROOT, Walk, free_port

_START_S = 120.0
_READY = "Ray runtime started"


class SharedCluster:
    """A head with all GPUs, and enough cores that no step waits for another: on two cores steps take fractions."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.process: Process | None = None

    def start(self) -> None:
        """Start the head, and make the walk's commands join it.

        Raises:
            RuntimeError: it did not start; names its log.
        """
        port, metrics, has_page = free_port(), free_port(), has_dashboard_page()
        dashboard = free_port() if has_page else None
        settings = {
            "--port": port,
            "--num-cpus": max(16, os.cpu_count() or 1),
            "--num-gpus": self.walk.num_gpus if self.walk.device == "cuda" else 0,
            "--node-ip-address": "127.0.0.1",
            "--temp-dir": self.walk.temporary / "ray",
            "--metrics-export-port": metrics,
            "--min-worker-port": 0,
            "--max-worker-port": 0,
            "--ray-client-server-port": free_port(),
            "--dashboard-agent-listen-port": free_port(),
            "--object-store-memory": 200 * 2**20,
            "--include-dashboard": str(has_page).lower(),
            **({"--dashboard-port": dashboard} if dashboard else {}),
        }
        words = [f"{key}={value}" for key, value in settings.items()]
        self.process = Process(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *words],
            # Jobs call `python`, which must be this one.
            {**self.walk.environment, "PATH": f"{Path(sys.executable).parent}:{self.walk.environment['PATH']}"},
            ROOT,
            self.walk.logs / "cluster.log",
        )
        while _READY not in self.process.text:
            if not self.process.is_running or self.process.seconds > _START_S * self.walk.patience:
                raise RuntimeError(f"`ray start` did not come up: see {self.process.log}")
            time.sleep(0.2)
        self.walk.environment |= {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        self.walk.metrics_port, self.walk.dashboard_port = metrics, dashboard

    def close(self) -> None:
        if self.process is not None:
            self.process.end()


def has_dashboard_page() -> bool:
    """Return whether this Ray has its dashboard's page; without it the dashboard, and so `ray job`, does not start."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "dashboard" / "client" / "build" / "index.html").is_file()

"""Ray cluster of several nodes on this machine, each started by the command of its systemd unit (cluster/systemd/).

Ports, folders and resources are the only differences from a unit, since nodes of one machine cannot share them.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[3]
_START_SECONDS = 240.0


class LocalNodes:
    """A head without CPUs for work, and nodes that join and are killed. `close` kills only what this object started."""

    def __init__(self) -> None:
        # Short, for Ray's sockets: their paths have at most 107 characters. A part of tests.chaos has a short TMPDIR
        # of its own, removed at its end.
        here = tempfile.gettempdir()
        self.folder = Path(tempfile.mkdtemp(prefix="fl-", dir=here if Path(here).name.startswith("fl-") else "/tmp"))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        unit = (ROOT / "cluster" / "systemd" / "ray.env").read_text(encoding="utf-8")
        settings = dict(re.findall(r"^(RAY_\w+|HF_\w+)=(.+)$", unit, flags=re.MULTILINE))
        python = Path(sys.executable).parent
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            **settings,
            "RAY_AUTH_TOKEN_PATH": str(token),
            "PATH": f"{python}:{os.environ['PATH']}",
            "DS_ACCELERATOR": "cpu",
        }
        self.port, self.dashboard_port = _free_port(), _free_port()

    @property
    def dashboard(self) -> str:
        """Address for `ray job submit`."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def start_head(self) -> None:
        """Start the head and wait until its dashboard accepts jobs."""
        self._start("head", 0, {"--port": self.port, "--dashboard-port": self.dashboard_port})
        deadline = time.monotonic() + _START_SECONDS
        while not self._accepts_jobs():
            if time.monotonic() > deadline or self.processes["head"].poll() is not None:
                raise RuntimeError(
                    f"the head did not start within {_START_SECONDS:.0f} s: see {self.folder / 'head.log'}"
                )
            time.sleep(0.5)

    def start_node(self, name: str, num_cpus: int) -> None:
        """Start a node that joins the head."""
        self._start(name, num_cpus, {"--address": f"127.0.0.1:{self.port}"})

    def kill_node(self, name: str) -> int:
        """Kill all processes of a node by SIGKILL, as a power cut does. Returns their number."""
        started = self.processes.pop(name)
        root = psutil.Process(started.pid)
        victims = [root, *root.children(recursive=True)]
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):  # some end by themselves once their parent is gone
                victim.kill()
        started.wait(timeout=10)
        psutil.wait_procs(victims, timeout=10)
        return len(victims)

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command as a client of this cluster, in the checkout."""
        settings = {"env": self.environment, "cwd": ROOT, "capture_output": True, "text": True, "check": False}
        return subprocess.run(command, **(settings | options))

    def close(self) -> None:
        """Kill all nodes, the head last, and remove their files."""
        for name in [name for name in self.processes if name != "head"] + ["head"] * ("head" in self.processes):
            self.kill_node(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _accepts_jobs(self) -> bool:
        token = (self.folder / "token").read_text(encoding="utf-8")
        request = urllib.request.Request(f"{self.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return bool(reply.status == 200)
        except OSError:  # refused, or an answer that it cannot give yet
            return False

    def _start(self, name: str, num_cpus: int, changed: dict[str, object]) -> None:
        unit = ROOT / "cluster" / "systemd" / f"finlora-ray-{'head' if name == 'head' else 'worker'}.service"
        (line,) = re.findall(r"^ExecStart=(.+)$", unit.read_text(encoding="utf-8"), flags=re.MULTILINE)
        line = line.replace("${FINLORA_NODE_IP}", "127.0.0.1").replace("${FINLORA_HEAD_IP}", "127.0.0.1")
        changed |= {"--temp-dir": self.folder / name, "--num-cpus": num_cpus, "--num-gpus": 0}
        changed |= {"--min-worker-port": 0, "--max-worker-port": 0, "--ray-client-server-port": _free_port()}
        changed |= {"--dashboard-agent-listen-port": _free_port(), "--object-store-memory": 100 * 2**20}
        if name != "head":
            del changed["--ray-client-server-port"]
        words = [word for word in shlex.split(line)[1:] if word.partition("=")[0] not in changed]
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            *words,
            *(f"{key}={value}" for key, value in changed.items()),
        ]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, cwd=self.folder
            )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

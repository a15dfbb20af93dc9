"""`finlora serve` and `finlora train` as child processes on a tiny base, for checks that watch or kill them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from finlora.pipeline.ray_workarounds import remove_left_semaphores
from tests.chaos.record import leftovers, say

ROOT = Path(__file__).resolve().parents[2]
READY_S = 600.0
TRIES = 6
BASE = (
    *("vocab_size=512", "hidden_size=64", "intermediate_size=128", "num_layers=2", "num_heads=4", "num_kv_heads=2"),
    *("context_length=64", "batch_size=4", "num_steps=40"),
)


class LiveCommands:
    """Commands that run until SIGTERM, each with its own Ray.

    Args:
        folder: of all their files; short, for Ray's sockets.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[str] = []
        self.roots: dict[str, subprocess.Popen[bytes]] = {}
        self.seen: dict[int, psutil.Process] = {}
        """Every process ever seen below the commands, by pid."""
        (folder / "token").write_text(secrets.token_hex(32))
        (folder / "token").chmod(0o600)
        (folder / "tmp").mkdir()
        self.key = secrets.token_urlsafe(24)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "DS_ACCELERATOR": "cpu",
            "TMPDIR": str(folder / "tmp"),
            "RAY_TMPDIR": str(folder / "ray"),
            "FINLORA_API_KEY": self.key,
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        (folder / "ray").mkdir()

    def close(self) -> None:
        """End the commands by SIGTERM, and add what stays behind to `faults`."""
        processes = [(name, process, descendants(process.pid)) for name, process in self.roots.items()]
        self.roots = {}
        for _, process, _ in processes:
            process.send_signal(signal.SIGTERM)
        for name, process, below in processes:
            try:
                code = process.wait(timeout=120)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait(timeout=10)
                self.faults.append(f"the {name} did not end within 120 s of SIGTERM")
            expected = {"server": 0, "training": 143}[name]
            if code != expected:
                self.faults.append(f"the {name} exited with {code}, expected {expected}: its log follows")
                say((self.folder / f"{name}.log").read_text(errors="replace")[-3000:])
            psutil.wait_procs(below, timeout=20)
            pids = {str(each.pid) for each in below}
            for path in Path("/dev/shm").glob("sem.*"):
                if path.name[7:].partition("-")[0] in pids:
                    os.utime(
                        path, (time.time() - 3600, time.time() - 3600)
                    )  # semaphores are swept when older than a minute
            remove_left_semaphores()  # the next pipeline on this machine sweeps them this way
            members = {**self.seen, **{each.pid: each for each in below}}
            left = leftovers(of=list(members.values()), folder=self.folder / "tmp")
            self.faults += [f"the {name} left {what}" for what in left]

    def choose_port(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def wait_for(self, words: str) -> None:
        """Wait until the server has printed these words."""
        log, until = self.folder / "server.log", time.monotonic() + READY_S
        while words not in (text := log.read_text(encoding="utf-8", errors="replace")):
            if self.roots["server"].poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start: {text[-3000:]}")
            time.sleep(0.5)

    def serve(self) -> None:
        """Start the server and wait until it serves; retries where Ray missed its own start limit of 30 s."""
        for _ in range(TRIES):
            self.start("server", "serve", "--config", "serve_configs/cpu-demo.yaml", *self.serve_settings())
            try:
                self.wait_for("Serving ")
                return
            except RuntimeError as error:
                if "Ray did not start on this machine" not in str(error):
                    raise
                self.roots.pop("server").wait()
        raise RuntimeError(f"Ray did not start on this machine in {TRIES} tries")

    def make_base(self) -> None:
        here = self.folder
        for command in (
            ("prepare", "synthetic", "--output", str(here / "data")),
            ("pretrain", "--tasks", "synthetic", "--output", str(here / "base"), "--device", "cpu", *BASE),
            (
                "train",
                "--config",
                "jobs/configs/demo-4bit-r4.yaml",
                *self.train_settings("short", 1),
                "train.max_steps=4",
            ),
        ):
            done = subprocess.run(finlora(*command), env=self.environment, cwd=ROOT, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        shutil.copytree(here / "runs" / "short" / "adapter", here / "adapters" / "synthetic")

    def train_settings(self, name: str, epochs: int) -> tuple[str, ...]:
        here = self.folder
        return (
            *(
                f"name={name}",
                f"output_dir={here / 'runs'}",
                f"model.base={here / 'base'}",
                f"data.dir={here / 'data'}",
            ),
            *(f"train.epochs={epochs}", "train.checkpoint_every_steps=50", "train.cpus_per_worker=0.5"),
        )

    def serve_settings(self) -> tuple[str, ...]:
        here = self.folder
        return (
            *(f"model.base={here / 'base'}", f"adapters_dir={here / 'adapters'}", f"audit_dir={here / 'audit'}"),
            *("keys_file=null", "stages.cache_rows=4096", "--port", str(self.port)),
        )

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.roots[name] = subprocess.Popen(
                finlora(*command), env=self.environment, cwd=ROOT, stdout=log, stderr=log
            )


def finlora(*command: str) -> list[str]:
    return [sys.executable, "-m", "finlora.cli.main", *command]


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.Error:
        return "ended"

"""Tools of an acceptance walk's steps: folders, settings, commands, the shared cluster."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import site
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from acceptance.checks import Checks, StepError
from acceptance.processes import MARK, Done, Process
from acceptance.verbs.scale import Scale

ROOT = Path(__file__).resolve().parents[2]
_TAIL = 1500


@dataclass
class Walk:
    """One walk. Steps share it; each gets its own `Tools`."""

    base: Path
    data: Path | None
    """Folder with raw sets `fpb` and `xbrl`. None: only generated sets."""
    output: Path
    device: str
    num_gpus: int
    scale: Scale
    patience: float
    """Factor on every time limit."""
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    environment: dict[str, str] = field(default_factory=dict)
    verbs: set[str] = field(default_factory=set)
    """Verbs that the steps ran."""
    temporary: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="fa-")))
    """Short: Ray puts sockets below it, whose paths have 107 characters at most."""
    metrics_port: int | None = None
    """Metrics address of the shared cluster, for Prometheus."""
    dashboard_port: int | None = None
    """Address of the shared cluster for `ray job submit`. None: this Ray has no dashboard."""

    def __post_init__(self) -> None:
        for folder in (self.logs, self.runs, self.output / "home", self.output / "ended"):
            folder.mkdir(parents=True, exist_ok=True)
        token = self.temporary / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FINLORA_"))}
        own.pop(
            "PYTHONDONTWRITEBYTECODE", None
        )  # images set it; each of a hundred processes would compile all its imports
        self.environment = {
            **own,
            MARK: self.mark,
            # Never touches the user's ~/finlora, ~/.config and caches.
            "HOME": str(self.output / "home"),
            "PYTHONUSERBASE": site.getuserbase(),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), own.get("PYTHONPATH")])),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(self.temporary / "ray"),
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
        }
        self.config.write_text(yaml.safe_dump(self._settings(), sort_keys=False), encoding="utf-8")

    @property
    def task(self) -> str:
        """Task of the main adapter, whose labels are the three sentiments."""
        return "fpb" if self.data else "synthetic_sentiment"

    @property
    def config(self) -> Path:
        return self.output / "accept.yaml"

    @property
    def runs(self) -> Path:
        return self.output / "runs"

    @property
    def logs(self) -> Path:
        return self.output / "logs"

    @property
    def prepared(self) -> Path:
        return self.output / "data"

    def close(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)

    def forget(self, patterns: Sequence[str]) -> None:
        """Remove the output of an earlier try of a step."""
        for pattern in patterns:
            for path in self.output.glob(pattern):
                shutil.rmtree(path)

    def shorten(self, words: Sequence[str]) -> str:
        """Return a command as the table shows it: folders by name."""
        text = shlex.join(words)
        names = {self.config: "CONFIG", self.base: "BASE", self.output: "OUT"}
        names |= {self.data: "DATA"} if self.data else {}
        for path, name in names.items():
            text = text.replace(str(path), name)
        return text

    def _settings(self) -> dict[str, Any]:
        scale = self.scale
        on_gpu = self.device == "cuda"
        share = {"gpus_per_worker": scale.share} if on_gpu else {}
        return {
            "name": "main",
            "output_dir": str(self.runs),
            "max_wait_s": 300.0,
            "model": {"base": str(self.base), "bits": 4, "template": "chat", "max_seq_len": 8192},
            "lora": {"rank": 4, "alpha": 32, "dropout": 0.05},
            "data": {
                "tasks": [self.task],
                "dir": str(self.prepared),
                "max_train_examples": scale.num_train,
                "max_test_examples": scale.num_test,
            },
            "optim": {"learning_rate": scale.learning_rate},
            "train": {
                **share,
                "device": self.device,
                "num_workers": 1,
                "global_batch_size": 16,
                "epochs": 1,
                "log_every_steps": 1,
            },
            "eval": {"device": self.device, **({"num_gpus": scale.share} if on_gpu else {})},
        }


class Tools:
    """One step's commands and their outcomes."""

    def __init__(self, walk: Walk, checks: Checks) -> None:
        self.walk, self.checks, self.scale = walk, checks, walk.scale
        self._number = 0
        self.processes: list[Process] = []

    def start(self, *words: object, environment: dict[str, str | None] | None = None) -> Process:
        """Start `finlora` with these words and return at once."""
        arguments = [str(word) for word in words]
        self.walk.verbs.add(arguments[0])
        self._shown = f"finlora {self.walk.shorten(arguments)}"
        return self._start([sys.executable, "-m", "finlora.cli.main", *arguments], environment)

    def finlora(self, *words: object, code: int = 0, environment: dict[str, str | None] | None = None) -> Done:
        """Run a command and wait for it; another exit code than `code` is a failed check and ends the step."""
        return self.end(self.start(*words, environment=environment), code)

    def background(self, words: Sequence[str]) -> Process:
        """Start another program, which is killed at the step's end."""
        self._shown = self.walk.shorten(["python", *words[1:]])
        return self._start(list(words), None)

    def command(self, words: Sequence[str], shown: str, code: int = 0) -> Done:
        """Run another program."""
        self._shown = shown
        return self.end(self._start(list(words), None), code)

    def end(self, process: Process, code: int = 0) -> Done:
        """Wait for a command that was started."""
        done = process.wait(self.limit)
        self.checks.about(self._shown, done.seconds)
        if done.code != code:
            self.checks.fail("exit code", str(code), f"{done.code}: {done.text.strip()[-_TAIL:]}")
            raise StepError(f"exit code {done.code}: {process.log}")
        return done

    @property
    def limit(self) -> float:
        return self.scale.seconds * self.walk.patience

    def until(self, is_so: Callable[[], bool], process: Process, what: str) -> None:
        """Wait until a running command makes a condition true.

        Raises:
            StepError: the command ended first, or the wait took too long.
        """
        while not is_so():
            if not process.is_running or process.seconds > self.limit:
                self.checks.about(self._shown, process.seconds)
                self.checks.fail(what, f"within {self.limit:.0f} s", f"not so: {process.text.strip()[-_TAIL:]}")
                raise StepError(what)
            time.sleep(0.05)

    def results(self, run: str) -> list[dict[str, Any]]:
        """Return the records of a run's results.jsonl."""
        text = (self.walk.runs / run / "results.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def close(self) -> None:
        for process in self.processes:
            if process.is_running:
                process.end()

    def _start(self, command: list[str], environment: dict[str, str | None] | None) -> Process:
        self._number += 1
        log = self.walk.logs / f"{self.checks.step}-{self._number}.log"
        merged = {**self.walk.environment, **(environment or {})}
        kept = {name: value for name, value in merged.items() if value is not None}
        process = Process(command, kept, ROOT, log)
        self.processes.append(process)
        return process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""Soak test: the CPU server under light load beside a long training for an hour; memory and descriptors must stay flat.

    python -m tests.soak --minutes 60 --figure docs/explanation/soak.png --record soak.jsonl
    python -m tests.soak --minutes 3 --every 2      # a test of the script itself

The commands are real: `finlora serve` with serve_configs/cpu-demo.yaml, and `finlora train` with two workers and a
checkpoint every 50 steps. A few users ask for labels and streamed texts, use a wrong key, and send invalid bodies.
psutil samples resident memory, file descriptors and threads of every process below both commands; files in the
temporary folder and segments in /dev/shm are counted as well. At the end both commands get SIGTERM.

Flat means, over the last two thirds of the time: the Theil-Sen slope of a role's resident memory is below 4 % of its
median an hour (or below 8 MiB an hour, where that is more), and that of its descriptors below 2 an hour. Exit code 1: a
role of ours grows, an answer was lost, or something stayed behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.live_commands import READY_S, LiveCommands, descendants, title
from tests.chaos.record import say
from tests.chaos.time_budget import StoppedError, run_to_end
from tests.soak.curve import RAYS_OWN, report

ROLES = (
    ("proxy", r"ray::ProxyActor"),
    ("replica", r"ray::ServeReplica"),
    ("stage", r"ray::StageActor"),
    ("controller", r"ray::(TrainController|ServeController)"),
    ("worker", r"ray::(RayTrainWorker|_?RayTrain|TrainWorker)"),
    ("driver", r"finlora\.cli\.main"),
)
"""Our processes by title; all others are Ray's own."""
USERS, THINK_S = 3, 0.4
EPOCHS = 500
"""Of 200 steps each: more than an hour holds. A run plans all its batches at the start, so the number is finite."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=15.0, help="seconds between two samples")
    parser.add_argument("--figure", type=Path, help="PNG of the curve")
    parser.add_argument("--record", type=Path, help="JSON lines of the samples")
    parser.add_argument("--draw", type=Path, help="run nothing; draw and judge this record")
    options = parser.parse_args()
    if options.draw:
        samples = [json.loads(line) for line in options.draw.read_text(encoding="utf-8").splitlines()]
        return report(samples, options.figure)
    folder = Path(tempfile.mkdtemp(prefix="fl-", dir="/tmp"))  # short, for Ray's sockets
    try:
        with Soak(folder) as soak:
            samples = soak.run(options.minutes * 60, options.every, options.record)
        is_bad = report(samples, options.figure)
        for line in soak.live.faults:
            say(f"FAULT: {line}")
        return int(bool(is_bad or soak.live.faults))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Soak:
    """Server and training, and the requests to the server."""

    def __init__(self, folder: Path) -> None:
        self.live = LiveCommands(folder)
        self.asked: Counter[str] = Counter()

    def __enter__(self) -> Soak:
        self.live.make_base()
        self.live.choose_port()
        try:
            # One after the other: two Rays that start together on two busy cores miss Ray's own start limit of 30 s.
            self.live.serve()
            self.live.start(
                "training",
                "train",
                "--config",
                "jobs/configs/demo-4bit-r4.yaml",
                *self.live.train_settings("soak", EPOCHS),
            )
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not StoppedError:  # after a signal all processes are killed instead
            self.live.close()

    def run(self, seconds: float, every_s: float, record: Path | None) -> list[dict[str, Any]]:
        """Send requests and sample until the time is over; returns the samples."""
        return asyncio.run(self._run(seconds, every_s, record))

    async def _run(self, seconds: float, every_s: float, record: Path | None) -> list[dict[str, Any]]:
        import aiohttp

        samples: list[dict[str, Any]] = []
        async with aiohttp.ClientSession(f"http://127.0.0.1:{self.live.port}") as session:
            await self._wait_until_ready(session)
            started = time.monotonic()
            users = [asyncio.create_task(self._ask_on(session, n)) for n in range(USERS)]
            stream = record.open("w", encoding="utf-8") if record else None
            while (passed := time.monotonic() - started) < seconds:
                for name, process in self.live.roots.items():
                    if process.poll() is not None:
                        self.live.faults.append(
                            f"the {name} exited by itself with {process.returncode} after {passed:.0f} s"
                        )
                if any(process.poll() is not None for process in self.live.roots.values()):
                    break
                sample = await asyncio.to_thread(self._sample, passed)
                samples.append(sample)
                if stream:
                    stream.write(json.dumps(sample) + "\n")
                    stream.flush()
                await asyncio.sleep(max(0.0, every_s - (time.monotonic() - started - passed)))
            for user in users:
                user.cancel()
            await asyncio.gather(*users, return_exceptions=True)
            if stream:
                stream.close()
        say(f"requests: {dict(self.asked)}; training at step {self._step():,}")
        return samples

    async def _wait_until_ready(self, session: Any) -> None:
        import aiohttp

        until = time.monotonic() + READY_S
        while True:
            try:
                async with session.get("/readyz", headers={"Authorization": f"Bearer {self.live.key}"}) as reply:
                    if reply.status == 200 and self._step():
                        return
            except aiohttp.ClientError:
                pass
            if time.monotonic() > until or any(process.poll() is not None for process in self.live.roots.values()):
                for name in self.live.roots:
                    say((self.live.folder / f"{name}.log").read_text(errors="replace")[-3000:])
                raise TimeoutError(f"server and training were not both running within {READY_S:.0f} s")
            await asyncio.sleep(1.0)

    async def _ask_on(self, session: Any, number: int) -> None:
        """Send one request after the other, each with a known status."""
        headers = {"Authorization": f"Bearer {self.live.key}"}
        text = "Nordhaven Shipping lifted its outlook after profit rose {} %"
        turn = number
        while True:
            turn += 1
            model = "demo:synthetic" if turn % 2 else "demo"
            label = {"model": model, "task": "fpb", "text": text.format(turn % 97)}
            written = {"model": model, "prompt": text.format(turn % 89), "max_tokens": 12, "stream": True}
            path, body, own, expected = (
                ("/v1/classify", label, headers, 200),
                ("/v1/completions", written, headers, 200),
                ("/v1/classify", label, headers, 200),
                ("/v1/classify", label, {"Authorization": "Bearer wrong"}, 401),
                ("/v1/completions", {**written, "max_tokens": -1}, headers, 400),
                ("/v1/chat/completions", {"model": model, "messages": [], "stream": 3}, headers, 400),
            )[turn % 6]
            async with session.post(path, json=body, headers=own) as reply:
                content = await reply.read()
                self.asked[f"{path} {reply.status}"] += 1
                is_cut = body is written and not content.rstrip().endswith(b"data: [DONE]")
                if (reply.status != expected and (expected, reply.status) != (400, 422)) or is_cut:
                    self.live.faults.append(f"{path} returned {reply.status} instead of {expected}: {content[:200]!r}")
            await asyncio.sleep(THINK_S)

    def _sample(self, seconds: float) -> dict[str, Any]:
        rows = []
        for name, process in self.live.roots.items():
            for member in [psutil.Process(process.pid), *descendants(process.pid)]:
                try:
                    with member.oneshot():
                        rows.append(
                            {
                                "side": name,
                                "role": role_of(member),
                                "title": title(member),
                                "pid": member.pid,
                                "rss_mib": round(member.memory_info().rss / 2**20, 2),
                                "descriptors": member.num_fds(),
                                "threads": member.num_threads(),
                            }
                        )
                except psutil.Error:
                    continue  # the process has ended
        files = sum(len(names) for _, _, names in os.walk(self.live.folder / "tmp"))
        return {
            "seconds": round(seconds, 1),
            "step": self._step(),
            "asked": sum(self.asked.values()),
            "temporary_files": files,
            "segments": len(list(Path("/dev/shm").iterdir())),
            "processes": rows,
        }

    def _step(self) -> int:
        from finlora.train.run.progress import last_progress
        from finlora.train.run.run_folder import RunFolder

        last = last_progress(RunFolder(self.live.folder / "runs" / "soak"))
        return 0 if last is None else last.step


def role_of(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    return next((role for role, pattern in ROLES if re.search(pattern, line)), RAYS_OWN)


if __name__ == "__main__":
    sys.exit(run_to_end(main))

"""Training jobs on local Ray nodes that lose a node and are stopped: the result must equal an undisturbed run's.

    python -m tests.chaos.nodes.node_failure                # about 4 minutes on two cores, no GPU
    python -m tests.chaos.nodes.node_failure --steps 200    # shorter

A head, two nodes of one core each, token authentication; every command is a client's `ray job ...`. First an
undisturbed run, whose log is followed. Then the same run under another name: after a third of its steps one node is
killed with all its processes and another joins; after two thirds `ray job stop` stops the job, which is submitted
again. Exit code 1: losses or adapter of the two runs differ by a bit, or a wait exceeded its limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from tests.chaos.nodes.local_nodes import LocalNodes
from tests.chaos.time_budget import run_to_end

LIMIT_S = 240.0
"""Limit of each single wait."""
BASE = (
    *("vocab_size=512", "hidden_size=64", "intermediate_size=128", "num_layers=2", "num_heads=4", "num_kv_heads=2"),
    *("context_length=64", "batch_size=4", "num_steps=20"),
)


def make_base(nodes: LocalNodes) -> None:
    """Generate data and a small base model in the cluster's folder."""
    finlora = (sys.executable, "-m", "finlora.cli.main")
    for command in (
        ("prepare", "synthetic_sentiment", "--output", str(nodes.folder / "data")),
        ("pretrain", "--tasks", "synthetic", "--output", str(nodes.folder / "base"), "--device", "cpu", *BASE),
    ):
        nodes.run(*finlora, *command, check=True)


def settings(nodes: LocalNodes, name: str, steps: int) -> list[str]:
    """Return the overrides of a run, in float32: two runs must be equal bit for bit."""
    here = nodes.folder
    return [
        *(f"name={name}", f"output_dir={here / 'runs'}", f"model.base={here / 'base'}", f"data.dir={here / 'data'}"),
        *("model.bits=16", "model.compute_dtype=float32", "train.precision=fp32", "data.tasks=[synthetic_sentiment]"),
        *("train.device=cpu", "train.num_workers=2", "train.cpus_per_worker=1", "train.global_batch_size=8"),
        *(f"train.max_steps={steps}", "train.epochs=50", "train.checkpoint_every_steps=10", "train.log_every_steps=1"),
    ]


def submit(nodes: LocalNodes, name: str, steps: int) -> str:
    """Submit a training job without waiting for it; returns the submission id."""
    identity = f"{name}-{time.time_ns() // 1_000_000}"
    job = ("python", "jobs/train.py", *settings(nodes, name, steps))
    options = ("--address", nodes.dashboard, "--submission-id", identity, "--working-dir", ".", "--no-wait")
    done = nodes.run("ray", "job", "submit", *options, "--", *job)
    if done.returncode != 0:
        raise RuntimeError(f"ray job submit exited with {done.returncode}: {done.stdout}{done.stderr}")
    return identity


def steps_done(nodes: LocalNodes, name: str) -> list[tuple[int, float]]:
    """Return (step, loss) of each complete line of the run's progress file, in order."""
    path = nodes.folder / "runs" / name / "progress.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def wait_until(what: str, is_true: Callable[[], bool], limit_s: float = LIMIT_S, every_s: float = 0.25) -> float:
    """Poll a condition every `every_s` seconds until it is true; returns the seconds waited."""
    started = time.monotonic()
    while not is_true():
        if time.monotonic() - started > limit_s:
            raise TimeoutError(f"waited {limit_s:.0f} s for {what}")
        time.sleep(every_s)
    return time.monotonic() - started


def status_of(nodes: LocalNodes, identity: str) -> str:
    """Return the job's status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    done = nodes.run("ray", "job", "list", "--address", nodes.dashboard)
    (_, _, row) = done.stdout.partition(f"submission_id='{identity}'")
    return row.partition("status=<JobStatus.")[2].partition(":")[0]


def log_of(nodes: LocalNodes, identity: str) -> str:
    return nodes.run("ray", "job", "logs", identity, "--address", nodes.dashboard).stdout


def follow(nodes: LocalNodes, identity: str, seen: list[tuple[float, str]]) -> None:
    """Append each line of a job's log with its arrival time, until the job ends."""
    command = ["ray", "job", "logs", "--follow", identity, "--address", nodes.dashboard]
    with subprocess.Popen(command, env=nodes.environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            seen.append((time.monotonic(), line.rstrip()))


def run_quietly(nodes: LocalNodes, steps: int) -> None:
    """Train undisturbed, and follow the log as a user does."""
    identity, seen = submit(nodes, "quiet", steps), []
    thread = threading.Thread(target=follow, args=(nodes, identity, seen))
    thread.start()
    seconds = wait_until(
        "the undisturbed run", lambda: status_of(nodes, identity) in ("SUCCEEDED", "FAILED", "STOPPED")
    )
    thread.join(timeout=30)
    if status_of(nodes, identity) != "SUCCEEDED":
        raise RuntimeError(log_of(nodes, identity))
    early = sum(1 for when, line in seen if line.startswith("quiet: ") and when < seen[-1][0] - 1.0)
    print(f"undisturbed run  {seconds:6.1f} s; {early} progress lines arrived during training")
    if not early:
        raise RuntimeError("no progress line arrived before the end: logs are not streamed")


def run_with_trouble(nodes: LocalNodes, steps: int) -> None:
    """Train, kill a node, stop the job, submit it again."""
    identity = submit(nodes, "troubled", steps)

    def last_step() -> int:
        return max((step for step, _ in steps_done(nodes, "troubled")), default=0)

    wait_until("a third of the steps", lambda: last_step() >= steps // 3)
    at_kill, lines = last_step(), len(steps_done(nodes, "troubled"))
    num_processes = nodes.kill_node("b")
    time.sleep(3.0)
    nodes.start_node("c", 1)
    seconds = wait_until("steps after the kill", lambda: len(steps_done(nodes, "troubled")) > lines)
    again = steps_done(nodes, "troubled")[lines][0]
    print(
        f"node killed      at step {at_kill} ({num_processes} processes); recovered {seconds:.1f} s after a new node started"
    )
    words = [line for line in log_of(nodes, identity).splitlines() if line.startswith("Waiting, ")]
    print(f"                 first step after the kill: {again}; {words[0] if words else 'NO WAIT WAS LOGGED'}")
    if not words:
        raise RuntimeError("the run did not log what it waited for")
    wait_until("two thirds of the steps", lambda: last_step() >= 2 * steps // 3)
    started = time.monotonic()
    nodes.run("ray", "job", "stop", identity, "--address", nodes.dashboard)
    wait_until("the stop", lambda: status_of(nodes, identity) == "STOPPED")
    words = [line for line in log_of(nodes, identity).splitlines() if line.startswith("Stopped by SIGTERM at step")]
    print(f"ray job stop     {time.monotonic() - started:6.1f} s: {words[0] if words else 'NO CHECKPOINT WAS LOGGED'}")
    identity = submit(nodes, "troubled", steps)
    seconds = wait_until("the end", lambda: status_of(nodes, identity) in ("SUCCEEDED", "FAILED", "STOPPED"))
    if not words or status_of(nodes, identity) != "SUCCEEDED":
        raise RuntimeError(log_of(nodes, identity))
    print(f"submitted again  {seconds:6.1f} s to the end")


def compare(nodes: LocalNodes) -> bool:
    """Return whether both runs have equal losses and adapters."""
    quiet, troubled = dict(steps_done(nodes, "quiet")), dict(steps_done(nodes, "troubled"))
    adapters = [
        nodes.folder / "runs" / name / "adapter" / "adapter_model.safetensors" for name in ("quiet", "troubled")
    ]
    is_loss_equal = quiet == troubled
    is_adapter_equal = adapters[0].read_bytes() == adapters[1].read_bytes()
    print(f"losses equal     {is_loss_equal} ({len(quiet)} logged, last {list(quiet.values())[-1]:.6f})")
    print(f"adapters equal   {is_adapter_equal} ({adapters[0].stat().st_size:,} bytes)")
    return is_loss_equal and is_adapter_equal


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.nodes.node_failure", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps of each run")
    options = parser.parse_args()
    started = time.monotonic()
    nodes = LocalNodes()
    try:
        make_base(nodes)
        nodes.start_head()
        nodes.start_node("a", 1)
        nodes.start_node("b", 1)
        print(f"cluster is up    {time.monotonic() - started:6.1f} s, in {nodes.folder}", flush=True)
        run_quietly(nodes, options.steps)
        run_with_trouble(nodes, options.steps)
        is_equal = compare(nodes)
    finally:
        nodes.close()
    print(f"Took {time.monotonic() - started:.0f} s")
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(run_to_end(main))

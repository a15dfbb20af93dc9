"""Search job on local Ray nodes that loses a node with its trials: every trial must end exactly once.

    python -m tests.chaos.nodes.search_failure                             # about 4 minutes on two cores, no GPU
    python -m tests.chaos.nodes.search_failure --trials 4 --steps 60       # shorter

A head and two nodes, token authentication, `ray job submit`. When a trial has ended and others train on both nodes, one
node is killed with all its processes and not replaced. Exit code 1: a trial that ended before the kill was repeated or
lost, a trial of the killed node did not resume from its checkpoint, or the search did not complete.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import psutil

from tests.chaos.nodes.local_nodes import LocalNodes
from tests.chaos.nodes.node_failure import LIMIT_S, log_of, make_base, settings, status_of, wait_until
from tests.chaos.time_budget import run_to_end

NAME = "search"
EVERY_STEPS = 0.1
"""Share of a trial's steps between two checkpoints, and ASHA's first rung."""


def submit(nodes: LocalNodes, num_trials: int, steps: int) -> str:
    """Submit the search without waiting for it; returns the submission id."""
    own = [
        *settings(nodes, NAME, steps),
        # A trial is a driver of 0.05 CPUs and a worker: two trials fit on a node of two CPUs.
        *("train.num_workers=1", "train.cpus_per_worker=0.9", "eval.device=cpu", "eval.bits=null", "search.bits=[16]"),
        *(f"search.num_trials={num_trials}", "search.rank=[2,4]", "search.learning_rate=[3e-4,3e-3]"),
        *(f"search.grace_share={EVERY_STEPS}", "data.max_test_examples=50", "search.validation_share=0.05"),
        "search.max_concurrent=3",
    ]
    options = ("--address", nodes.dashboard, "--submission-id", NAME, "--working-dir", ".", "--no-wait")
    done = nodes.run("ray", "job", "submit", *options, "--", "python", "jobs/tune.py", *own)
    if done.returncode != 0:
        raise RuntimeError(f"ray job submit exited with {done.returncode}: {done.stdout}{done.stderr}")
    return NAME


def trials_of(nodes: LocalNodes) -> Path:
    return nodes.folder / "runs" / NAME / "trials"


def ended(nodes: LocalNodes) -> dict[str, tuple[int, str]]:
    """Return modification time and text of the record of each ended trial."""
    records = trials_of(nodes).glob("*/trial.json")
    return {path.parent.name: (path.stat().st_mtime_ns, path.read_text(encoding="utf-8")) for path in records}


def steps_of(nodes: LocalNodes, trial: str) -> list[int]:
    """Return the logged steps of a trial, in order."""
    path = trials_of(nodes) / trial / "progress.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line)["step"] for line in lines if line]


def lock_of(nodes: LocalNodes, trial: str) -> str:
    """Return the lock of a trial, written by its driver once no worker of an earlier driver is left."""
    return (trials_of(nodes) / trial / "lock").read_text(encoding="utf-8")


def parts_on(nodes: LocalNodes, name: str) -> dict[str, set[str]]:
    """Return the trials on a node, each with driver, worker or both, by the open files of its processes.

    A driver holds the lock of its trial's folder open, a worker its TensorBoard events.
    """
    root = trials_of(nodes)
    found: dict[str, set[str]] = {}
    for process in psutil.Process(nodes.processes[name].pid).children(recursive=True):
        try:
            paths = [Path(file.path) for file in process.open_files()]
        except psutil.Error:
            continue
        for path in paths:
            if path.is_relative_to(root):
                trial, inner, *_ = path.relative_to(root).parts
                if inner in ("lock", "tensorboard"):
                    found.setdefault(trial, set()).add("driver" if inner == "lock" else "worker")
    return found


def has_listed_checkpoint(nodes: LocalNodes, trial: str) -> bool:
    """Return whether Ray Train has registered a checkpoint; its controller polls the workers every 2 s."""
    path = trials_of(nodes) / trial / "checkpoint_manager_snapshot.json"
    return path.is_file() and "checkpoint_dir_name" in path.read_text(encoding="utf-8")


def run_with_a_loss(nodes: LocalNodes, num_trials: int, steps: int) -> bool:
    """Run the search, kill node b while it trains, and check the result."""
    identity = submit(nodes, num_trials, steps)

    def is_over() -> bool:
        return status_of(nodes, identity) in ("SUCCEEDED", "FAILED", "STOPPED")

    def running() -> dict[str, set[str]]:
        """Return running trials of node b with a checkpoint, empty unless a driver is among them."""
        parts = {name: kinds for name, kinds in parts_on(nodes, "b").items() if name not in ended(nodes)}
        parts = {name: kinds for name, kinds in parts.items() if has_listed_checkpoint(nodes, name)}
        return parts if any("driver" in kinds for kinds in parts.values()) else {}

    lost: dict[str, set[str]] = {}

    def is_time() -> bool:
        lost.clear()
        lost.update(running() if ended(nodes) else {})
        return bool(lost)

    seconds = wait_until("an ended trial and a running one on node b", is_time)
    before = ended(nodes)
    at_kill = {name: steps_of(nodes, name)[-1] for name in lost}
    noted = {name: len(steps_of(nodes, name)) for name in lost}
    locks = {name: lock_of(nodes, name) for name, kinds in lost.items() if "driver" in kinds}
    num_processes = nodes.kill_node("b")
    killed = time.monotonic()
    print(
        f"node killed      {seconds:6.1f} s after the search was submitted, with {num_processes} processes; "
        f"{len(before)} trials had ended, {len(lost)} ran on it"
    )
    again: dict[str, tuple[float, int]] = {}

    def all_run_again() -> bool:
        waiting = lost.keys() - again.keys() - ended(nodes).keys()
        for name in waiting:
            steps = steps_of(nodes, name)
            if name in locks and lock_of(nodes, name) == locks[name]:
                noted[name] = len(steps)  # of a worker whose driver is dead, so that it ends as well
            elif new := steps[noted[name] :]:
                again[name] = (time.monotonic() - killed, new[0])
        return waiting <= again.keys()

    wait_until("the lost trials", all_run_again)
    for name, (seconds, step) in sorted(again.items()):
        print(
            f"recovered        {seconds:6.1f} s after the kill: {name}, which lost its {' and '.join(sorted(lost[name]))} "
            f"at step {at_kill[name]}, from step {step}"
        )
    wait_until("the end of the search", is_over, 4 * LIMIT_S)
    print(f"search ended     {time.monotonic() - killed:6.1f} s after the kill: {status_of(nodes, identity)}")
    after = ended(nodes)
    states = [json.loads(text)["state"] for _, text in after.values()]
    is_kept = all(after.get(name) == record for name, record in before.items())
    rung = max(1, round(EVERY_STEPS * steps))
    # A resumed trial logs a step after a checkpoint; a restarted one would log step 1.
    is_resumed = bool(again) and all(step > rung for _, step in again.values())
    causes = [json.loads(text)["cause"] for _, text in after.values() if json.loads(text)["state"] == "failed"]
    print(f"trials           {', '.join(f'{states.count(state)} {state}' for state in sorted(set(states)))}")
    print(f"ended ones kept  {is_kept} ({len(before)} records unchanged)")
    print(f"lost ones resume {is_resumed}{''.join(f'; failed: {cause}' for cause in causes)}")
    is_whole = status_of(nodes, identity) == "SUCCEEDED" and len(after) == num_trials and not causes
    if not is_whole:
        print(log_of(nodes, identity))
    return is_kept and is_resumed and is_whole


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.nodes.search_failure", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of each trial")
    options = parser.parse_args()
    started = time.monotonic()
    nodes = LocalNodes()
    try:
        make_base(nodes)
        nodes.start_head()
        for name in ("a", "b"):
            nodes.start_node(name, 2)
        print(f"cluster is up    {time.monotonic() - started:6.1f} s, in {nodes.folder}", flush=True)
        is_right = run_with_a_loss(nodes, options.trials, options.steps)
    finally:
        nodes.close()
    print(f"Took {time.monotonic() - started:.0f} s")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(run_to_end(main))

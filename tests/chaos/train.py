"""Training on local Ray nodes whose processes are killed, run out of memory or pause, one after the other.

Each command is the user's: `finlora train`, and the same command again where it has ended. Losses of each step and the
adapter must equal those of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import psutil

from finlora.durable import scratch_folder
from tests.chaos.nodes import node_failure
from tests.chaos.nodes.local_nodes import ROOT, LocalNodes
from tests.chaos.nodes.node_failure import BASE, settings, steps_done
from tests.chaos.record import Injection, Tally, leftovers, plain, say

STEPS = 600
COORDINATOR = "_AutoscalingCoordinatorActor"
"""Ray Train's own detached actor, one in each cluster: it stays for the next run."""
LIMIT_S = 400.0
wait_until = functools.partial(node_failure.wait_until, limit_s=LIMIT_S, every_s=0.1)
"""`wait_until` with the limits of this part, for a shared machine."""
PLAN = (
    *(["worker killed"] * 4 + ["controller killed"] * 3 + ["driver killed"] * 3 + ["node killed"] * 3),
    *(["worker out of memory"] * 3 + ["worker held up"] * 2),
)
TITLES = {"worker": "ray::RayTrainWorker", "controller": "ray::TrainController", "trial": "ray::ImplicitFunc"}


class FaultyCluster:
    """Ray nodes of this machine, and every process ever seen below them."""

    def __init__(self) -> None:
        self.nodes = LocalNodes()
        temporary = self.nodes.folder / "tmp"
        temporary.mkdir()
        self.nodes.environment |= {
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(temporary),
            "TUNE_RESULT_BUFFER_LENGTH": "1",
            "RAY_ADDRESS": f"127.0.0.1:{self.nodes.port}",
            "OMP_NUM_THREADS": "1",
        }
        self.seen: dict[int, psutil.Process] = {}
        self.names = iter("abcdefghijklmnopqrstuvwxyz")
        self.alive: list[str] = []
        self.is_up = False

    def start(self) -> None:
        finlora = (sys.executable, "-m", "finlora.cli.main")
        own = {name: value for name, value in self.nodes.environment.items() if name != "RAY_ADDRESS"}
        here = self.nodes.folder
        for command in (
            ("prepare", "synthetic_sentiment", "--output", str(here / "data")),
            ("pretrain", "--tasks", "synthetic", "--output", str(here / "base"), "--device", "cpu", *BASE),
        ):
            self.nodes.run(*finlora, *command, check=True, env=own)
        self.nodes.start_head()
        self.is_up = True
        for _ in range(2):
            self.add_node()
        wait_until("three nodes", lambda: len(self._list("nodes", tries=1)) == 3)

    def add_node(self) -> None:
        self.alive.append(next(self.names))
        self.nodes.start_node(self.alive[-1], 1)

    def find(self, role: str) -> list[psutil.Process]:
        """Return the living processes of a role, oldest first."""
        found = []
        for root in self.nodes.processes.values():
            with contextlib.suppress(psutil.Error):
                for process in psutil.Process(root.pid).children(recursive=True):
                    self.seen[process.pid] = process
                    with contextlib.suppress(psutil.Error):
                        if process.cmdline() and process.cmdline()[0].startswith(TITLES[role]):
                            found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def launch(self, *command: str) -> subprocess.Popen[str]:
        log = (self.nodes.folder / "driver.log").open("w")
        return subprocess.Popen(
            [sys.executable, "-m", "finlora.cli.main", *command],
            env=self.nodes.environment,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            text=True,
        )

    def last_line(self) -> str:
        """Return the last line that the user of the ended command sees."""
        lines = (self.nodes.folder / "driver.log").read_text(encoding="utf-8", errors="replace").splitlines()
        ours = [line for line in lines if re.match(r"(\w+ )?error: |Stopped", line)]
        return plain((ours or [line for line in lines if line.strip()] or ["nothing"])[-1], self.nodes.folder)

    def close(self) -> list[str]:
        """Kill the nodes; returns what stayed behind in Ray before and on the machine after."""
        for role in TITLES:
            self.find(role)
        left = []
        for what in ("actors", "placement-groups") if self.is_up else ():
            found = self._list(what)
            kinds = sorted({str(each.get("class_name", each.get("name", ""))) for each in found})
            left += [f"{what} in Ray ({', '.join(kinds)})"] if found else []
        for name in [*self.alive, "head"]:
            if name in self.nodes.processes:
                self.nodes.kill_node(name)
        temporary = self.nodes.folder / "tmp"
        for path in temporary.glob("finlora-*"):
            os.utime(path, (time.time() - 3600, time.time() - 3600))
        with scratch_folder(temporary, "finlora-checkpoint-"):
            pass  # the next worker on the node sweeps old folders this way
        left += leftovers(of=list(self.seen.values()), folder=temporary)
        self.nodes.close()
        return left

    def _list(self, what: str, tries: int = 10) -> list[dict[str, object]]:
        """Return what is alive in Ray of a kind, without Ray Train's own; waits up to `tries` seconds for it to end."""
        state = "CREATED" if what == "placement-groups" else "ALIVE"
        form = ("--format", "json", "--address", self.nodes.dashboard)
        found: list[dict[str, object]] = []
        for _ in range(tries):
            done = self.nodes.run("ray", "list", what, "--filter", f"state={state}", *form)
            with contextlib.suppress(ValueError):
                found = [each for each in json.loads(done.stdout) if each.get("class_name") != COORDINATOR]
                if not found:
                    break
            time.sleep(1.0)
        return found


def break_training(tally: Tally, seed: int) -> None:
    """Train once undisturbed, then with faults, in as many runs as the faults need."""
    cluster, rng = FaultyCluster(), random.Random(f"{seed} train")
    plan = list(PLAN)
    rng.shuffle(plan)
    try:
        cluster.start()
        _train_undisturbed(cluster)
        number, pending = 0, list(plan)
        while pending and not tally.is_over:
            number += 1
            injections = _train_with_faults(cluster, f"troubled-{number}", pending, rng, tally)
            # A run that stalled counts as lost already, and has no result to compare.
            lost = "" if any(each.lost for each in injections) else _compare(cluster, f"troubled-{number}")
            for each in injections:
                tally.add(Injection(**{**values_of(each), "lost": each.lost or lost}))
    finally:
        left = cluster.close()
    if left:
        tally.add(Injection("all of these", "training", seed, "leftovers", ", ".join(left)))


def _train_undisturbed(cluster: FaultyCluster) -> None:
    started = time.monotonic()
    driver = cluster.launch("train", *_settings(cluster, "quiet"))
    _wait_for_end(driver)
    if driver.returncode != 0:
        raise RuntimeError(f"the undisturbed run exited with {driver.returncode}: {cluster.last_line()}")
    say(f"undisturbed run: {STEPS} steps in {time.monotonic() - started:.0f} s")


def _train_with_faults(
    cluster: FaultyCluster, name: str, pending: list[str], rng: random.Random, tally: Tally
) -> list[Injection]:
    """Inject pending faults until the run has ended, and remove them from the list."""
    command = ("train", *_settings(cluster, name), "train.max_failures=50")
    driver, injections = cluster.launch(*command), []
    while True:
        try:
            _wait_for_steps(cluster, name, rng.randrange(5, 60), driver)
        except TimeoutError as error:  # recovered from the fault and stalled later: lost as well
            driver.kill()
            last = injections.pop() if injections else Injection("no fault", name, 0, "nothing")
            return [*injections, Injection(**{**values_of(last), "lost": f"the run stalled: {error}"})]
        if driver.poll() is not None and _last_step(cluster, name) >= STEPS:
            return injections
        if driver.poll() is not None:
            injections.append(
                Injection(
                    "no fault", name, 0, cluster.last_line(), f"the command exited with {driver.returncode} by itself"
                )
            )
            return injections
        if not pending or tally.is_over or _last_step(cluster, name) > STEPS - 40:
            _wait_for_end(driver)
            continue
        seed = rng.randrange(2**32)
        injection, driver = _break(cluster, name, pending.pop(0), seed, driver, command)
        say(f"  {injection.kind} in {name} at step {_last_step(cluster, name)}: {injection.seen}")
        injections.append(injection)


def _break(
    cluster: FaultyCluster, name: str, kind: str, seed: int, driver: subprocess.Popen[str], command: tuple[str, ...]
) -> tuple[Injection, subprocess.Popen[str]]:
    rng = random.Random(seed)
    time.sleep(rng.uniform(0, 1.5))
    for role in TITLES:
        cluster.find(role)  # remembers the processes that are about to be killed
    lines, started, lost = len(steps_done(cluster.nodes, name)), time.monotonic(), ""
    target, _, fault = kind.partition(" ")
    _inject(cluster, target, fault, rng, driver)
    seen = []
    try:
        if target == "controller":  # workers still finish a step or two, which is no recovery
            driver.wait(LIMIT_S)
        while len(steps_done(cluster.nodes, name)) <= lines and _last_step(cluster, name) < STEPS:
            if driver.poll() is not None:
                if target != "driver":
                    seen.append(f"the command exits with {driver.returncode}: {cluster.last_line()}")
                driver = cluster.launch(*command)
                seen.append("the same command resumes")
            if time.monotonic() - started > LIMIT_S:
                raise TimeoutError(f"no step within {LIMIT_S:.0f} s of the fault")
            time.sleep(0.1)
    except (TimeoutError, subprocess.TimeoutExpired) as error:
        lost = str(error)
        driver.kill()
    words = "; ".join(seen) or ("nothing" if fault == "held up" else "the run waits and resumes by itself")
    return Injection(fault, f"training {target}", seed, words, lost, time.monotonic() - started), driver


def _inject(cluster: FaultyCluster, target: str, fault: str, rng: random.Random, driver: subprocess.Popen[str]) -> None:
    if target == "driver":
        driver.kill()
        driver.wait()
        return
    if target == "node":
        victim = rng.choice(cluster.alive)
        cluster.alive.remove(victim)
        cluster.nodes.kill_node(victim)
        cluster.add_node()
        return
    victim = rng.choice(cluster.find(target))
    if fault == "killed":
        victim.kill()
    elif fault == "out of memory":
        victim.rlimit(resource.RLIMIT_AS, (2**20, 2**20))  # no more memory from now on
    else:
        victim.send_signal(signal.SIGSTOP)
        time.sleep(rng.uniform(2, 8))
        victim.send_signal(signal.SIGCONT)


def _compare(cluster: FaultyCluster, name: str) -> str:
    quiet, troubled = (dict(steps_done(cluster.nodes, each)) for each in ("quiet", name))
    if quiet != troubled:
        differing = [step for step in sorted(quiet | troubled) if quiet.get(step) != troubled.get(step)]
        return f"losses of {name} differ from the undisturbed run at steps {differing[:5]}"
    runs = cluster.nodes.folder / "runs"
    adapters = [(runs / each / "adapter" / "adapter_model.safetensors").read_bytes() for each in ("quiet", name)]
    return "" if adapters[0] == adapters[1] else f"the adapter of {name} differs from the undisturbed run's"


def _settings(cluster: FaultyCluster, name: str) -> list[str]:
    own = [each for each in settings(cluster.nodes, name, STEPS) if not each.startswith("train.epochs")]
    return [*own, "train.epochs=50", "train.max_stall_s=60", "max_wait_s=600"]


def _last_step(cluster: FaultyCluster, name: str) -> int:
    return max((step for step, _ in steps_done(cluster.nodes, name)), default=0)


def _wait_for_end(driver: subprocess.Popen[str]) -> None:
    wait_until("the run's end", lambda: driver.poll() is not None)


def _wait_for_steps(cluster: FaultyCluster, name: str, count: int, driver: subprocess.Popen[str]) -> None:
    """Wait for `count` more logged steps, or for the end of the command."""
    before = len(steps_done(cluster.nodes, name))
    wait_until("steps", lambda: len(steps_done(cluster.nodes, name)) >= before + count or driver.poll() is not None)


def values_of(injection: Injection) -> dict[str, object]:
    return {name: getattr(injection, name) for name in Injection.__slots__}

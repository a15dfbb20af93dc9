"""A training and a search on Ray nodes of this machine, whose processes are killed, starved and held up one after the other.

Every command is the user's: `finlora train`, and the same again where it has ended. The losses of each step and the adapter must
equal those of a run that nobody touched, bit for bit; a search must end with the same scores, and without training a finished
trial again.
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
from tests.chaos.record import Injection, Tally, plain, say, traces

STEPS = 600
COORDINATOR = "_AutoscalingCoordinatorActor"
"""Ray Train's own: one a cluster, detached, so that it stays for the next run."""
LIMIT_S = 400.0
wait_until = functools.partial(node_failure.wait_until, limit_s=LIMIT_S, every_s=0.1)
"""Longest wait for any one thing, on a machine that others use too."""
PLAN = (
    *(["worker killed"] * 4 + ["controller killed"] * 3 + ["driver killed"] * 3 + ["node killed"] * 3),
    *(["worker out of memory"] * 3 + ["worker held up"] * 2),
)
TITLES = {"worker": "ray::RayTrainWorker", "controller": "ray::TrainController", "trial": "ray::ImplicitFunc"}


class Fire:
    """The nodes, and everything that was ever started below them."""

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

    def said(self) -> str:
        """Return the last line of the command that has ended, as its user sees it."""
        lines = (self.nodes.folder / "driver.log").read_text(encoding="utf-8", errors="replace").splitlines()
        ours = [line for line in lines if re.match(r"(\w+ )?error: |Stopped", line)]
        return plain((ours or [line for line in lines if line.strip()] or ["nothing"])[-1], self.nodes.folder)

    def close(self) -> list[str]:
        """Look at what stays behind in Ray, end the nodes, and look again."""
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
            pass  # as the next worker on the node does
        left += traces(of=list(self.seen.values()), folder=temporary)
        self.nodes.close()
        return left

    def _list(self, what: str, tries: int = 10) -> list[dict[str, object]]:
        """Return what lives in Ray of a kind, after a moment in which the last ones may end; Ray's own does not count."""
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


def run_training_under_fire(tally: Tally, seed: int) -> None:
    """Train once in peace, then with faults, as many runs as they take."""
    fire, rng = Fire(), random.Random(f"{seed} train")
    plan = list(PLAN)
    rng.shuffle(plan)
    try:
        fire.start()
        _train_in_peace(fire)
        number, pending = 0, list(plan)
        while pending and not tally.is_over:
            number += 1
            injections = _train_under_fire(fire, f"troubled-{number}", pending, rng, tally)
            # A run that stood still has lost already, and has no end to compare.
            lost = "" if any(each.lost for each in injections) else _compare(fire, f"troubled-{number}")
            for each in injections:
                tally.add(Injection(**{**values_of(each), "lost": each.lost or lost}))
    finally:
        left = fire.close()
    if left:
        tally.add(Injection("all of these", "training", seed, "what stayed behind", ", ".join(left)))


def _train_in_peace(fire: Fire) -> None:
    started = time.monotonic()
    driver = fire.launch("train", *_settings(fire, "quiet"))
    _wait_for_end(driver)
    if driver.returncode != 0:
        raise RuntimeError(f"the quiet run ended with {driver.returncode}: {fire.said()}")
    say(f"{STEPS} steps without a fault took {time.monotonic() - started:.0f} s")


def _train_under_fire(fire: Fire, name: str, pending: list[str], rng: random.Random, tally: Tally) -> list[Injection]:
    """Inject what is pending until the run is at its end; what is injected is taken from the list."""
    command = ("train", *_settings(fire, name), "train.max_failures=50")
    driver, injections = fire.launch(*command), []
    while True:
        try:
            _wait_for_steps(fire, name, rng.randrange(5, 60), driver)
        except TimeoutError as error:  # it went on after the fault and stood still later: lost all the same
            driver.kill()
            last = injections.pop() if injections else Injection("no fault", name, 0, "nothing")
            return [*injections, Injection(**{**values_of(last), "lost": f"the run stood still: {error}"})]
        if driver.poll() is not None and _last(fire, name) >= STEPS:
            return injections
        if driver.poll() is not None:
            injections.append(
                Injection("no fault", name, 0, fire.said(), f"it ended by itself with {driver.returncode}")
            )
            return injections
        if not pending or tally.is_over or _last(fire, name) > STEPS - 40:
            _wait_for_end(driver)
            continue
        seed = rng.randrange(2**32)
        injection, driver = _break(fire, name, pending.pop(0), seed, driver, command)
        say(f"  {injection.kind} in {name} at step {_last(fire, name)}: {injection.seen}")
        injections.append(injection)


def _break(
    fire: Fire, name: str, kind: str, seed: int, driver: subprocess.Popen[str], command: tuple[str, ...]
) -> tuple[Injection, subprocess.Popen[str]]:
    rng = random.Random(seed)
    time.sleep(rng.uniform(0, 1.5))
    for role in TITLES:
        fire.find(role)  # so that what is killed is remembered
    lines, started, lost = len(steps_done(fire.nodes, name)), time.monotonic(), ""
    target, _, fault = kind.partition(" ")
    _inject(fire, target, fault, rng, driver)
    seen = []
    try:
        if target == "controller":  # workers still do a step or two, and that is no recovery
            driver.wait(LIMIT_S)
        while len(steps_done(fire.nodes, name)) <= lines and _last(fire, name) < STEPS:
            if driver.poll() is not None:
                if target != "driver":
                    seen.append(f"the command ends with {driver.returncode}: {fire.said()}")
                driver = fire.launch(*command)
                seen.append("the same command goes on")
            if time.monotonic() - started > LIMIT_S:
                raise TimeoutError(f"no step within {LIMIT_S:.0f} s of the fault")
            time.sleep(0.1)
    except (TimeoutError, subprocess.TimeoutExpired) as error:
        lost = str(error)
        driver.kill()
    words = "; ".join(seen) or ("nothing" if fault == "held up" else "the run waits and goes on by itself")
    return Injection(fault, f"training {target}", seed, words, lost, time.monotonic() - started), driver


def _inject(fire: Fire, target: str, fault: str, rng: random.Random, driver: subprocess.Popen[str]) -> None:
    if target == "driver":
        driver.kill()
        driver.wait()
        return
    if target == "node":
        victim = rng.choice(fire.alive)
        fire.alive.remove(victim)
        fire.nodes.kill_node(victim)
        fire.add_node()
        return
    victim = rng.choice(fire.find(target))
    if fault == "killed":
        victim.kill()
    elif fault == "out of memory":
        victim.rlimit(resource.RLIMIT_AS, (2**20, 2**20))  # as of now it gets no more
    else:
        victim.send_signal(signal.SIGSTOP)
        time.sleep(rng.uniform(2, 8))
        victim.send_signal(signal.SIGCONT)


def _compare(fire: Fire, name: str) -> str:
    quiet, troubled = (dict(steps_done(fire.nodes, each)) for each in ("quiet", name))
    if quiet != troubled:
        differing = [step for step in sorted(quiet | troubled) if quiet.get(step) != troubled.get(step)]
        return f"{name} has other losses than the quiet run at steps {differing[:5]}"
    runs = fire.nodes.folder / "runs"
    adapters = [(runs / each / "adapter" / "adapter_model.safetensors").read_bytes() for each in ("quiet", name)]
    return "" if adapters[0] == adapters[1] else f"{name} has another adapter than the quiet run"


def _settings(fire: Fire, name: str) -> list[str]:
    own = [each for each in settings(fire.nodes, name, STEPS) if not each.startswith("train.epochs")]
    return [*own, "train.epochs=50", "train.max_stall_s=60", "max_wait_s=600"]


def _last(fire: Fire, name: str) -> int:
    return max((step for step, _ in steps_done(fire.nodes, name)), default=0)


def _wait_for_end(driver: subprocess.Popen[str]) -> None:
    wait_until("the run's end", lambda: driver.poll() is not None)


def _wait_for_steps(fire: Fire, name: str, count: int, driver: subprocess.Popen[str]) -> None:
    """Return when so many steps more are noted, or the command has ended."""
    before = len(steps_done(fire.nodes, name))
    wait_until("steps", lambda: len(steps_done(fire.nodes, name)) >= before + count or driver.poll() is not None)


def values_of(injection: Injection) -> dict[str, object]:
    return {name: getattr(injection, name) for name in Injection.__slots__}

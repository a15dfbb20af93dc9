"""Queue of Ray jobs: submits them as `ray job submit --working-dir .` does, in the order of their needs, and waits for them.

Ray queues work for GPUs: a job's driver waits until its workers fit. The queue bounds only the number of drivers, since each
is a process and a machine has few spare cores beside its workers.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_POLL_SECONDS = 1.0
_STOP_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One command on the cluster."""

    name: str
    command: tuple[str, ...]
    """Words after `python`: a script of jobs/ and its arguments."""
    needs: tuple[str, ...] = ()
    """Names of jobs that must have succeeded before."""
    is_done: Callable[[], bool]
    """Whether its output exists; checked before it is submitted and after it ends."""
    driver_gpus: float = 0.0
    """GPUs of the command itself; training and evaluation reserve theirs from Ray."""


@dataclass(slots=True)
class Outcome:
    """Outcome of all jobs, by name."""

    kept: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    """Stopped or not started: the time limit was reached, or a job that they need failed."""


@dataclass(slots=True)
class JobQueue:
    """Runs jobs in one working directory; keeps each job's log as LOGS/NAME.log."""

    client: Any
    """Ray's JobSubmissionClient."""
    code: Path
    logs: Path
    max_jobs: int
    outcome: Outcome = field(default_factory=Outcome)
    _running: dict[str, tuple[Job, str, float]] = field(default_factory=dict)
    """Name -> job, submission id and time of submission."""

    def run(self, jobs: Sequence[Job], deadline: float) -> Outcome:
        """Run jobs in list order until all have ended or the deadline (time.monotonic) is reached."""
        self.logs.mkdir(parents=True, exist_ok=True)
        waiting = list(jobs)
        started = time.monotonic()
        while waiting or self._running:
            if time.monotonic() > deadline:
                self._stop_all()
                break
            waiting = self._submit_ready(waiting)
            time.sleep(_POLL_SECONDS)
            self._collect(started)
        self.outcome.not_run += [job.name for job in waiting]
        return self.outcome

    def _submit_ready(self, waiting: Sequence[Job]) -> list[Job]:
        """Submit jobs whose needs are met, and return the rest."""
        rest = []
        for job in waiting:
            ended_well = {*self.outcome.kept, *self.outcome.finished}
            if set(job.needs) & {*self.outcome.failed, *self.outcome.not_run}:
                self.outcome.not_run.append(job.name)
                print(f"{'not run':8} {job.name}: a job that it needs failed", flush=True)
            elif set(job.needs) <= ended_well and job.is_done():
                self.outcome.kept.append(job.name)
                print(f"{'kept':8} {job.name}", flush=True)
            elif set(job.needs) <= ended_well and len(self._running) < self.max_jobs:
                self._submit(job)
            else:
                rest.append(job)
        return rest

    def _submit(self, job: Job) -> None:
        resources: dict[str, Any] = {"entrypoint_num_gpus": job.driver_gpus} if job.driver_gpus else {}
        # After an interruption a name may be submitted again, an id may not.
        identity = f"{job.name}-{time.time_ns() // 1_000_000}"
        self.client.submit_job(
            entrypoint="python " + shlex.join(job.command),
            submission_id=identity,
            runtime_env={"working_dir": str(self.code)},
            **resources,
        )
        self._running[job.name] = (job, identity, time.monotonic())

    def _collect(self, started: float) -> None:
        """Record every job that has ended."""
        for name, (job, identity, submitted) in list(self._running.items()):
            status = self.client.get_job_status(identity)
            if not status.is_terminal():
                continue
            del self._running[name]
            self._keep_log(name, identity)
            is_good = status.value == "SUCCEEDED" and job.is_done()
            (self.outcome.finished if is_good else self.outcome.failed).append(name)
            now = time.monotonic()
            print(
                f"{'ended' if is_good else 'FAILED':8} {name:32} {now - submitted:6.0f} s, at {now - started:4.0f} s",
                flush=True,
            )
            if not is_good:
                print(self._last_lines(name), flush=True)

    def _stop_all(self) -> None:
        """End the running jobs, wait until Ray has ended them, and keep their logs."""
        for _, identity, _ in self._running.values():
            self.client.stop_job(identity)
        end = time.monotonic() + _STOP_SECONDS
        for name, (_, identity, _) in self._running.items():
            while not self.client.get_job_status(identity).is_terminal() and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
            self._keep_log(name, identity)
            self.outcome.not_run.append(name)
            print(f"{'stopped':8} {name}: the time limit was reached", flush=True)
        self._running.clear()

    def _keep_log(self, name: str, identity: str) -> None:
        (self.logs / f"{name}.log").write_text(self.client.get_job_logs(identity), encoding="utf-8")

    def _last_lines(self, name: str) -> str:
        lines = (self.logs / f"{name}.log").read_text(encoding="utf-8").splitlines()
        return "\n".join(f"    {line}" for line in lines[-15:])

"""Runner of a reproduction's steps on the connected cluster, several at once. Each step can resume, and none stops the others.

A step runs in a Ray actor, a process of its own on this node, which drives it as the trials of a search are driven: a training
starts its workers, an evaluation its task, each with the config's share of a GPU. What a step says goes to its log, which this
process repeats.

A stop (a signal, or the end of the time) starts no step more. Trainings that have done a step since their start write a
checkpoint and end. All else has nothing to save and is killed.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finlora.durable import try_lock
from finlora.errors import ResourceError, StoppedError
from finlora.reproduce.outcomes import Outcome, StepState, read_outcomes, to_do, write_outcome
from finlora.reproduce.step import Step
from finlora.train.run.progress import clear_step, read_step
from finlora.train.run.stop import stop_on_signals

_logger = logging.getLogger(__name__)

TIME_IS_UP = 75
"""Exit code after --minutes: EX_TEMPFAIL of sysexits.h, as the same command can go on."""
_POLL_S = 0.5
_CHECKPOINT_S = 60.0
"""Longest wait for the checkpoints of a stop. A training that has not ended by then resumes from an earlier one."""
_MINUTES = "--minutes"

OnProgress = Callable[[int, int, str], None]
"""Called with the steps that have ended, all steps, and a note of those that run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """End of a run through the plan."""

    outcomes: list[Outcome]
    """Of each step, in the plan's order."""
    stop: StoppedError | None
    """Why steps are left; None: each was tried."""


def run_plan(
    steps: Sequence[Step],
    output: Path,
    announce: Callable[[str], None] = _logger.warning,
    *,
    at_once: int = 1,
    deadline: float | None = None,
    on_progress: OnProgress = lambda _ended, _all, _note: None,
) -> Ended:
    """Run each step that is not done, in the plan's order, an adapter's evaluations after its training.

    Args:
        output: folder of the reproduction.
        announce: shows the user a line.
        at_once: most steps that run at the same time.
        deadline: `time.monotonic()` at which the plan stops. None: no limit.

    Raises:
        ResourceError: another command works in the folder.
    """
    outcomes = read_outcomes(output, steps)
    waiting = [step for step in steps if outcomes[step.name].state != StepState.DONE]
    numbers = {step.name: f"[{number}/{len(steps)}] {step.name}" for number, step in enumerate(steps, start=1)}
    stop = output / "stop"
    why = ""
    with _claim(output), stop_on_signals(stop, announce), _StepActors(output, announce) as actors:

        def collect() -> None:
            for outcome in actors.collect(_POLL_S):
                outcomes[outcome.name] = outcome
                if outcome.state != StepState.TO_DO:  # a stopped one has not ended
                    write_outcome(output, outcome)
                words = f": {outcome.cause}" if outcome.cause else ""
                words = f" in {outcome.seconds:.0f} s" if outcome.state == StepState.DONE else words
                announce(f"{numbers[outcome.name]}: {outcome.state}{words}")
            on_progress(len(steps) - len(waiting) - len(actors.running), len(steps), _describe(actors.running))

        while waiting or actors.running:
            why = stop.read_text(encoding="utf-8").strip() or (_MINUTES if _is_past(deadline) else "")
            if why:
                break
            while len(actors.running) < at_once and (step := choose_next(waiting, actors.running)):
                waiting.remove(step)
                announce(numbers[step.name])
                actors.start(step)
            collect()
        collect()
        grace = time.monotonic() + _CHECKPOINT_S
        while actors.running:
            for step in actors.running:
                if not has_begun(step) or _is_past(grace):
                    actors.kill(step)
                    outcomes[step.name] = to_do(step, "stopped before there was anything to save")
                else:
                    step.run.stop.write_text(why, encoding="utf-8")
            collect()
    ended = [outcomes[step.name] for step in steps]
    return Ended(outcomes=ended, stop=_describe_stop(why, ended) if why else None)


def choose_next(waiting: Sequence[Step], running: Sequence[Step]) -> Step | None:
    """Return the first waiting step whose training has ended; None where each waits for one."""
    trainings = {step.adapter for step in (*waiting, *running) if step.kind == "train"}
    return next((step for step in waiting if step.kind == "train" or step.adapter not in trainings), None)


def has_begun(step: Step) -> bool:
    """Return whether a running step has done something since its start that a checkpoint can save."""
    return step.kind == "train" and read_step(step.run) is not None


class StepActor:
    """Ray actor that runs one step after the other."""

    def run(self, step: Step, log: Path) -> Outcome:
        """Run a step; what it says is appended to a log."""
        from concurrent.futures import ThreadPoolExecutor

        from finlora.reproduce.run_rows import run_step

        def announce(line: str) -> None:
            with log.open("a", encoding="utf-8") as stream:
                stream.write(f"{line}\n")

        # In the main thread a training would handle signals, which Ray sends to end this process.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(run_step, step, announce).result()


@dataclass(kw_only=True, slots=True)
class _Running:
    step: Step
    actor: Any
    log: Path
    num_said: int = 0
    """Characters of the log that were repeated."""


class _StepActors:
    """Actors of the running steps, and idle ones: a process that has imported torch is used again."""

    def __init__(self, output: Path, announce: Callable[[str], None]) -> None:
        self._logs = output / "steps"
        self._announce = announce
        self._running: dict[Any, _Running] = {}
        self._idle: list[Any] = []

    def __enter__(self) -> _StepActors:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in (*self._idle, *(each.actor for each in self._running.values())):
            ray.kill(actor)

    @property
    def running(self) -> list[Step]:
        return [each.step for each in self._running.values()]

    def start(self, step: Step) -> None:
        """Give a step to an idle actor, or to a new one."""
        if step.run.step.is_file():
            clear_step(step.run)  # of an earlier start, from which `has_begun` would judge
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / f"{step.name}.log"
        log.write_text("", encoding="utf-8")
        actor = self._idle.pop() if self._idle else _make_actor()
        self._running[actor.run.remote(step, log)] = _Running(step=step, actor=actor, log=log)

    def collect(self, seconds: float) -> list[Outcome]:
        """Return the outcomes of steps that have ended, after a wait of at most `seconds` for one."""
        import ray

        if not self._running:
            return []
        ended, _ = ray.wait(list(self._running), timeout=seconds)
        self._say_new()
        return [self._end(reference) for reference in ended]

    def kill(self, step: Step) -> None:
        """End the process of a step. Its workers end with it."""
        import ray

        (reference,) = [found for found, each in self._running.items() if each.step is step]
        ray.kill(self._running.pop(reference).actor)

    def _end(self, reference: Any) -> Outcome:
        import ray

        each = self._running.pop(reference)
        try:
            outcome: Outcome = ray.get(reference)
        except ray.exceptions.RayError as error:  # its process crashed, or was ended by the system
            cause = " ".join(str(error).split())[:300]
            step = each.step
            self._forget(each.actor)
            return Outcome(name=step.name, key=step.key, state=StepState.FAILED, cause=f"its process ended: {cause}")
        self._idle.append(each.actor)
        return outcome

    def _forget(self, actor: Any) -> None:
        """End an actor, and free what its step had reserved."""
        import ray

        from finlora.train.run.wait_for_gpus import free_orphans

        ray.kill(actor)
        free_orphans()

    def _say_new(self) -> None:
        """Repeat the whole lines that steps have written since the last call."""
        for each in self._running.values():
            text = each.log.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            for line in whole[each.num_said :].splitlines():
                self._announce(f"{each.step.name}: {line}")
            each.num_said = len(whole)


def _make_actor() -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On this node, whose folders were checked. It computes nothing: a training's workers and an evaluation's task have the cores.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=here)(StepActor).remote()


@contextmanager
def _claim(output: Path) -> Iterator[None]:
    """Hold the folder against a second command."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lock").open("a") as stream:
        if not try_lock(stream):
            raise ResourceError(
                f"another `finlora reproduce` works in {output}: wait for its end, or give another --output."
            )
        yield


def _is_past(moment: float | None) -> bool:
    return moment is not None and time.monotonic() >= moment


def _describe(running: Sequence[Step]) -> str:
    """Return the names of running steps, with the steps of the trainings."""
    parts = []
    for step in running:
        done = read_step(step.run) if step.kind == "train" else None
        parts.append(f"{step.name} {done[0]}/{done[1]}" if done else step.name)
    return ", ".join(parts)


def _describe_stop(why: str, outcomes: Sequence[Outcome]) -> StoppedError:
    num_left = sum(outcome.state == StepState.TO_DO for outcome in outcomes)
    number = signal.Signals[why] if why in signal.Signals.__members__ else None
    return StoppedError(
        f"Stopped by {why}: {len(outcomes) - num_left} of {len(outcomes)} steps have ended, {num_left} are left. The same "
        "command goes on.",
        TIME_IS_UP if number is None else 128 + number,
    )

"""Scheduler of an acceptance walk's steps: several at a time, each after the steps that it needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step."""

    name: str
    run: Callable[[Any], None]
    needs: tuple[str, ...] = ()
    """Steps whose results this one uses. It runs if they ended, even with a failed check."""
    needs_ray: bool = True
    """Whether one of its commands joins the shared cluster."""
    makes: tuple[str, ...] = ()
    """Patterns of the folders that it makes in the walk's folder."""


def choose_steps(steps: Sequence[Step], only: Sequence[str]) -> list[Step]:
    """Return the requested steps and those that they need; all if none is requested.

    Raises:
        ValueError: there is no step of that name.
    """
    known = {step.name: step for step in steps}
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"{', '.join(unknown)}: no such step. Expected some of {', '.join(known)}.")
    wanted: set[str] = set()
    waiting = list(only or known)
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting += known[name].needs
    return [step for step in steps if step.name in wanted]


def run_steps(
    steps: Sequence[Step],
    run: Callable[[Step], bool],
    skip: Callable[[Step, str], None],
    num_at_once: int,
    stop: threading.Event,
) -> None:
    """Run every step after those that it needs.

    Args:
        steps: each after the steps that it needs.
        run: runs a step; returns whether it ended.
        skip: called with a step that cannot run, and the reason.
        stop: once set, no further step starts.
    """
    ended: dict[str, bool] = {}
    waiting = list(steps)
    running: dict[Future[bool], Step] = {}
    with ThreadPoolExecutor(num_at_once) as pool:
        while waiting or running:
            for step in list(waiting):
                broken = [name for name in step.needs if ended.get(name) is False]
                if broken:
                    skip(step, f"needs {', '.join(broken)}")
                    ended[step.name] = False
                    waiting.remove(step)
                elif len(running) < num_at_once and is_ready(step, ended) and not stop.is_set():
                    running[pool.submit(run, step)] = step
                    waiting.remove(step)
            if not running:
                if stop.is_set():
                    break
                continue
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                ended[running.pop(future).name] = future.result()
    for step in waiting:
        skip(step, "the walk was stopped")


def is_ready(step: Step, ended: Mapping[str, bool]) -> bool:
    """Return whether all steps that a step needs have ended."""
    return all(ended.get(name) is True for name in step.needs)

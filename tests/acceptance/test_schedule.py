"""Order, failures and limits of the walk's steps."""

from __future__ import annotations

import threading

import pytest

from acceptance.schedule import Step, choose_steps, run_steps
from acceptance.steps import STEPS


def steps_of(**needs):
    return [Step(name=name, run=lambda _tools: None, needs=tuple(others)) for name, others in needs.items()]


def walk(steps, broken=(), num_at_once=1, on_run=lambda _name: None):
    """Return the steps that ran, in order, and those skipped with their reasons."""
    ran, skipped = [], {}

    def run(step):
        on_run(step.name)
        ran.append(step.name)
        return step.name not in broken

    run_steps(steps, run, lambda step, why: skipped.update({step.name: why}), num_at_once, threading.Event())
    return ran, skipped


def test_step_runs_behind_what_it_needs_and_others_go_on_behind_a_broken_one():
    steps = steps_of(data=[], train=["data"], ask=["train"], tell=["ask"], plan=["data"])
    assert walk(steps) == (["data", "train", "ask", "tell", "plan"], {})
    assert walk(steps, broken={"train"}) == (["data", "train", "plan"], {"ask": "needs train", "tell": "needs ask"})


def test_no_more_steps_run_at_once_than_allowed():
    both = threading.Barrier(2, timeout=30)  # breaks, which is an error, unless two steps run at once
    ran, _ = walk(steps_of(one=[], other=[]), num_at_once=2, on_run=lambda _name: both.wait())
    assert sorted(ran) == ["one", "other"]
    running, most = [], []

    def count(name):
        running.append(name)
        most.append(len(running))
        running.remove(name)

    walk(steps_of(one=[], two=[], three=[]), num_at_once=1, on_run=count)
    assert max(most) == 1


def test_a_stopped_walk_begins_no_step():
    skipped = {}
    stop = threading.Event()
    stop.set()
    run_steps(steps_of(one=[]), lambda _step: True, lambda step, why: skipped.update({step.name: why}), 1, stop)
    assert skipped == {"one": "the walk was stopped"}


def test_chosen_steps_bring_those_that_they_need():
    steps = steps_of(data=[], train=["data"], ask=["train"], plan=[])
    assert [step.name for step in choose_steps(steps, ["ask"])] == ["data", "train", "ask"]
    assert choose_steps(steps, []) == steps
    with pytest.raises(ValueError, match=r"fly: no such step. Expected some of data, train, ask, plan."):
        choose_steps(steps, ["fly", "ask"])


def test_each_step_of_the_walk_comes_after_those_that_it_needs():
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    assert [step.name for step in STEPS if not set(step.needs) <= set(names[: names.index(step.name)])] == []

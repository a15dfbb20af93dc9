"""Trials whose driver crashed, as with its node; tests/chaos/nodes/search_failure.py kills a real one."""

from __future__ import annotations

import json

import pytest

from finlora.configfile import config_to_tree
from finlora.train.held_out import append_held_out
from finlora.train.search import run_trial
from finlora.train.search.asha import Listener
from finlora.train.search.run_trial import TrialTask, drive_trial
from finlora.train.search.search_folder import TrialRecord, open_search, read_record, write_record
from finlora.train.search.space import SearchConfig, sample_trials


@pytest.fixture
def task(make_config):
    """A trial that has reported twice, in a running search (its stop file is empty)."""
    config, search = make_config("name=s"), SearchConfig(num_trials=1)
    folder = open_search(config, search)
    folder.stop.touch()
    (point,) = sample_trials(config, search)
    run = folder.run_of(point)
    run.root.mkdir()
    for step, loss in ((2, 0.9), (4, 0.5)):
        append_held_out(run, step, loss)
    task = TrialTask(config=config_to_tree(config), search=str(folder.root), trial=point, total_steps=8)
    return folder, run, task


class Ended:
    """A trial of Ray Tune, as its callbacks get it."""

    def __init__(self, task, error):
        self.config, self.get_error = {"trial": task.trial.name}, lambda: error


def test_restarted_driver_frees_the_old_workers_then_repeats_its_reports_to_asha(task, monkeypatch):
    folder, run, own = task
    seen = []

    def train(_config, own_run):
        seen.append(("train", (own_run.root / "busy").is_file()))
        append_held_out(own_run, 8, 0.25)
        return {"accuracy": 0.5}, 2.5

    monkeypatch.setattr(run_trial, "free_group", lambda own_run: seen.append(("free", own_run == run)))
    monkeypatch.setattr(run_trial.tune, "report", lambda report: seen.append(("report", report)))
    monkeypatch.setattr(run_trial, "_train_and_score", train)
    drive_trial({"trial": own.trial.name}, {own.trial.name: own})
    assert seen == [
        ("free", True),
        ("report", {"step": 2, "held_out_loss": 0.9}),
        ("report", {"step": 4, "held_out_loss": 0.5}),
        ("train", True),
        ("report", {"step": 9, "held_out_loss": 0.25, "accuracy": 0.5}),
    ]
    record = read_record(folder, own.trial)
    assert (record.state, record.step, record.held_out_loss) == ("finished", 8, 0.25)
    assert not (run.root / "busy").exists()


def test_driver_that_crashed_too_often_is_recorded_with_its_cause(task):
    folder, run, own = task
    (run.root / "busy").touch()
    told = []
    listener = Listener(folder, {own.trial.name: own}, told.append)
    listener.on_trial_start(0, [], Ended(own, None))
    error = "ray::drive_trial()\n  File ...\nActorDiedError: The actor died because its node has died."
    listener.on_trial_error(0, [], Ended(own, error))
    record = read_record(folder, own.trial)
    assert (record.state, record.step) == ("failed", 4)
    assert record.cause == "ActorDiedError: The actor died because its node has died."
    assert told == [record]
    assert not (run.root / "busy").exists()


def test_trial_that_ended_before_its_driver_crashed_keeps_its_record(task, monkeypatch):
    """The node may crash after the record, before Ray Tune learns of it: restarted or given up, no work is repeated."""
    folder, run, own = task
    record = TrialRecord(trial=own.trial, state="finished", step=8, total_steps=8, held_out_loss=0.25, seconds=3.0)
    write_record(folder, record)
    before = (run.root / "trial.json").read_bytes()
    monkeypatch.setattr(run_trial, "_train_and_score", lambda *_arguments: pytest.fail("trained again"))
    drive_trial({"trial": own.trial.name}, {own.trial.name: own})
    assert not (run.root / "busy").exists()
    told = []
    listener = Listener(folder, {own.trial.name: own}, told.append)
    listener.on_trial_start(0, [], Ended(own, None))
    listener.on_trial_error(0, [], Ended(own, "its node has died"))
    assert (run.root / "trial.json").read_bytes() == before
    assert json.loads(before)["state"] == "finished"
    assert told == [record]

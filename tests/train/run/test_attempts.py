"""Work and waiting times of a run over its attempts, with a fake clock, also where the driver was killed."""

from __future__ import annotations

import errno

import pytest

from finlora.config import RunConfig
from finlora.configfile import save_config
from finlora.train.run import attempts as attempts_module
from finlora.train.run.attempts import AttemptClock, read_attempts
from finlora.train.run.progress import append_progress
from finlora.train.run.run_folder import RunFolder
from finlora.train.steps.loop import Progress


class Time:
    """A clock that only the test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def run(self, clock, seconds, *, is_waiting):
        for _ in range(seconds):
            self.now += 1.0
            clock.tick(is_waiting=is_waiting)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def times(folder):
    return [(attempt.seconds, attempt.waited) for attempt in read_attempts(folder)]


def log_steps(folder, *steps, examples_per_second=4.0):
    save_config(RunConfig(), folder.config)
    for step in steps:
        append_progress(
            folder,
            Progress(
                step=step,
                total_steps=100,
                epoch=1.0,
                loss=1.0,
                learning_rate=1e-4,
                tokens_per_second=1.0,
                examples_per_second=examples_per_second,
                memory_gib=1.0,
                seconds_left=1.0,
            ),
        )


def test_waiting_is_counted_apart(folder):
    time = Time()
    clock = AttemptClock(folder, time)
    time.run(clock, 40, is_waiting=True)
    time.run(clock, 25, is_waiting=False)
    time.run(clock, 5, is_waiting=True)  # again, after a failure
    time.run(clock, 3, is_waiting=False)
    clock.save()
    assert times(folder) == [(28.0, 45.0)]


def test_attempts_are_added_up_and_a_killed_one_counts_to_its_last_record(folder):
    time = Time()
    stopped = AttemptClock(folder, time)
    time.run(stopped, 33, is_waiting=False)
    stopped.save()
    killed = AttemptClock(folder, time)
    time.run(killed, 27, is_waiting=True)
    time.run(killed, 57, is_waiting=False)  # no save(): its process is gone 4 s after it last wrote
    last = AttemptClock(folder, time)
    time.run(last, 10, is_waiting=False)
    assert [(each.seconds, each.waited) for each in last.list()] == [(33.0, 0.0), (53.0, 27.0), (10.0, 0.0)]
    last.save()
    assert times(folder) == [(33.0, 0.0), (53.0, 27.0), (10.0, 0.0)]
    assert all(each.started.endswith("+00:00") for each in read_attempts(folder))


def test_run_started_before_times_were_kept_counts_its_logged_steps(folder):
    log_steps(folder, 10, 20, 30)  # 16 examples a step at 4 examples a second
    clock = AttemptClock(folder, Time())
    assert [(each.seconds, each.waited) for each in clock.list()] == [(120.0, 0.0), (0.0, 0.0)]


def test_damaged_record_counts_the_logged_steps(folder):
    log_steps(folder, 10)
    clock = AttemptClock(folder, Time())
    clock.save()
    folder.attempts.write_text(folder.attempts.read_text().replace("40.0", "41.0"))
    assert times(folder) == [(40.0, 0.0)]


def test_full_disk_does_not_end_the_run_here(folder, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(attempts_module, "write_whole", refuse)
    time = Time()
    clock = AttemptClock(folder, time)
    time.run(clock, 11, is_waiting=False)
    assert clock.list()[-1].seconds == 11.0
    assert read_attempts(folder) == []


def test_new_run_has_no_attempt_yet(folder):
    assert read_attempts(folder) == []

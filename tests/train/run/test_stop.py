"""Stop of a run: the first signal is a request to the workers, the second ends the driver."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from finlora.errors import StoppedError
from finlora.machine.signals import ENDING
from finlora.train.run.stop import StopRequest, describe_stop, stop_on_signals


@pytest.fixture
def path(tmp_path):
    return tmp_path / "stop"


@pytest.mark.parametrize("number", ENDING)
def test_first_signal_asks_the_workers_and_handlers_come_back(path, number):
    path.write_text("SIGINT")  # from the run before
    before = [signal.getsignal(each) for each in ENDING]
    lines = []
    with stop_on_signals(path, lines.append):
        request = StopRequest(path, worker=0, world_size=1)
        assert not request.is_asked()
        os.kill(os.getpid(), number)
        assert path.read_text() == signal.Signals(number).name
        assert StopRequest(path, worker=0, world_size=1).is_asked()
    assert lines == [
        f"{signal.Signals(number).name}: stopping after a checkpoint of this step. Once more ends at once, without one."
    ]
    assert [signal.getsignal(each) for each in ENDING] == before


def send(path, *numbers):
    with stop_on_signals(path, lambda line: None):
        for number in numbers:
            os.kill(os.getpid(), number)


def test_second_signal_ends_the_driver_at_once(path):
    with pytest.raises(KeyboardInterrupt):
        send(path, signal.SIGTERM, signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        send(path, signal.SIGINT, signal.SIGTERM)
    assert ended.value.code == 143


@pytest.mark.parametrize("number", ENDING)
def test_signal_before_the_first_step_ends_at_once(path, number):
    before, lines = [signal.getsignal(each) for each in ENDING], []
    words = rf"^Stopped by {number.name} before the first step: there was nothing to save"
    with pytest.raises(StoppedError, match=words) as stopped, stop_on_signals(path, lines.append, lambda: False):
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == 128 + number
    assert path.read_text() == number.name  # for workers that are starting
    assert lines == []
    assert [signal.getsignal(each) for each in ENDING] == before


def test_signals_are_left_alone_outside_the_main_thread(path):
    before, seen = [signal.getsignal(each) for each in ENDING], []

    def run():
        with stop_on_signals(path, lambda line: None):
            seen.extend(signal.getsignal(each) for each in ENDING)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == before
    assert path.read_text() == ""


def test_file_is_read_twice_a_second_at_most(path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("finlora.train.run.stop.time.monotonic", lambda: now[0])
    path.write_text("")
    request = StopRequest(path, worker=0, world_size=1)
    assert not request.is_asked()
    path.write_text("SIGTERM")
    now[0] += 0.4
    assert not request.is_asked()
    now[0] += 0.2
    assert request.is_asked()


@pytest.mark.parametrize(("text", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("by hand", 143)])
def test_end_is_reported_in_one_line_with_the_shells_code(path, text, code):
    path.write_text(text)
    error = describe_stop(path, 1200, 4000)
    assert str(error) == f"Stopped by {text} at step 1,200 of 4,000, which is saved: the same command resumes there."
    assert error.exit_code == code
    begun = str(describe_stop(path, 0, 4000))
    assert (
        begun == f"Stopped by {text} before the first step: there was nothing to save. The same command starts again."
    )


def test_hangup_leaves_the_terminal_and_a_second_one_does_not_end_the_driver(path, monkeypatch):
    left = []
    monkeypatch.setattr("finlora.train.run.stop.leave_terminal", lambda: left.append(1))
    send(path, signal.SIGHUP, signal.SIGHUP)
    assert path.read_text() == "SIGHUP"
    assert left == [1, 1]
    assert describe_stop(path, 3, 9).exit_code == 129


def test_hangup_that_nohup_ignores_stays_ignored(path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send(path, signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert path.read_text() == ""

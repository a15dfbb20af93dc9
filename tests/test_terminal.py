"""Progress of long work in a job log and on a terminal, and the display of our errors."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from finlora.errors import ConfigError, FinloraError
from finlora.terminal import Bars, describe_duration, open_bars, polling, saying_later, show_error


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (9, "0:09"), (65, "1:05"), (600, "10:00"), (3723, "1:02:03"), (90_000, "25:00:00")],
)
def test_duration_reads_as_a_clock(seconds, text):
    assert describe_duration(seconds) == text


def test_error_shows_its_kind_and_its_words_unchanged(capsys):
    show_error(ConfigError("data.tasks[0]=[red]x[/]: expected a text"))
    assert capsys.readouterr().err == "Config error: data.tasks[0]=[red]x[/]: expected a text\n"
    show_error(FinloraError("the loss became nan"))
    assert capsys.readouterr().err == "Finlora error: the loss became nan\n"


class Log:
    """A job's log with bars on a simulated clock, which ticks each second as the thread of open_bars does."""

    def __init__(self):
        self.now, self.stream = 1000.0, io.StringIO()
        self.bars = Bars(Console(file=self.stream, width=80), "loading", lambda: self.now)

    def wait(self, seconds):
        for _ in range(seconds):
            self.now += 1
            self.bars.tick()

    def take(self):
        """Return the lines since the last call."""
        lines = self.stream.getvalue().splitlines()
        self.stream.seek(0)
        self.stream.truncate()
        return lines


@pytest.fixture
def log():
    return Log()


def test_log_of_slow_steps_gets_a_line_each_ten_seconds(log):
    log.wait(25)
    assert log.take() == ["loading: 0:10", "loading: 0:20"]
    log.bars.update("pretraining", 1, 280, "loss 7.66")
    assert log.take() == ["pretraining: 1/280  loss 7.66  0:25"]
    log.wait(40)  # a step of 40 s
    assert log.take() == [f"pretraining: 1/280  loss 7.66  {time}" for time in ("0:35", "0:45", "0:55", "1:05")]
    log.bars.update("pretraining", 2, 280, "loss 7.20")
    log.wait(10)
    assert log.take() == ["pretraining: 2/280  loss 7.20  1:15"]


def test_log_of_fast_steps_gets_the_first_the_last_and_one_each_ten_seconds(log):
    for done in range(1, 101):
        log.bars.update("fpb", done, 100)
        log.now += 0.25
        log.bars.tick()
    assert log.take() == ["fpb: 1/100  0:00", "fpb: 40/100  0:10", "fpb: 80/100  0:20", "fpb: 100/100  0:24"]
    log.bars.update("fpb", 100, 100)  # a poll without progress
    log.wait(60)
    assert log.take() == []
    log.bars.update("ner", 5, 5)
    assert log.take() == ["ner: 5/5  1:25"]


def test_log_says_what_goes_on_until_nothing_does(log):
    log.bars.do("[1/3] first")
    log.wait(12)
    log.bars.do("[2/3] second")
    log.wait(12)
    log.bars.do(None)
    log.wait(60)
    assert log.take() == ["[1/3] first: 0:10", "[2/3] second: 0:10"]


def test_long_line_of_a_log_is_not_broken(log):
    log.bars.update("search", 1, 2, "x" * 300 + " [red]")
    assert log.take() == ["search: 1/2  " + "x" * 300 + " [red]  0:00"]


def test_open_bars_ticks_while_inside(monkeypatch):
    monkeypatch.setattr("finlora.terminal._TICK_SECONDS", 0.001)
    ticked = threading.Event()
    monkeypatch.setattr(Bars, "tick", lambda _self: ticked.set())
    with open_bars(Console(file=io.StringIO()), "loading"):
        assert ticked.wait(60)


def test_terminal_gets_a_live_bar():
    stream = io.StringIO()
    with open_bars(Console(file=stream, force_terminal=True, width=100), "loading") as bars:
        bars.update("fpb", 3, 10, "loss 0.5")
    assert "loading" in stream.getvalue()
    assert "3/10" in stream.getvalue()
    assert "loss 0.5" in stream.getvalue()


def test_polling_calls_while_inside_and_once_at_the_end():
    calls = []
    with polling(lambda: calls.append(1), seconds=60):
        assert calls == []
    assert calls == [1]


def test_polling_calls_at_the_end_of_failed_work_too():
    calls = []

    def fail():
        with polling(lambda: calls.append(1), seconds=60):
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        fail()
    assert calls == [1]


def test_what_fails_while_polling_is_reported_once_at_the_end():
    def fail():
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"), polling(fail, seconds=0.01):
        time.sleep(0.1)


@pytest.mark.parametrize(("shell", "code"), [("| true", 141), (">&-", 0)])
def test_output_that_nobody_reads_is_no_error(shell, code):
    command = f"set -o pipefail; {sys.executable} -m finlora.cli.main prepare list {shell}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_long_wait_is_reported_and_a_short_one_not(capsys):
    with saying_later("Waiting for an answer.", seconds=60):
        pass
    with saying_later("Waiting for an answer.", seconds=0):
        time.sleep(0.1)
    assert capsys.readouterr().err == "Waiting for an answer.\n"

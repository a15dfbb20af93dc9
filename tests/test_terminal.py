"""What long work looks like in a job log, and how our errors are shown."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from finlora.errors import ConfigError, FinloraError
from finlora.terminal import describe_duration, open_bars, polling, show_error


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


def test_job_log_gets_a_line_a_tenth_for_each_name():
    stream = io.StringIO()
    with open_bars(Console(file=stream)) as bars:
        for done in range(1, 101):
            bars.update("fpb", done, 100, f"note {done}")
        bars.update("ner", 5, 5)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["fpb: 1/100  note 1", "fpb: 10/100  note 10"]
    assert lines[-2:] == ["fpb: 100/100  note 100", "ner: 5/5"]
    assert len(lines) == 12


def test_terminal_gets_a_live_bar():
    stream = io.StringIO()
    with open_bars(Console(file=stream, force_terminal=True, width=100)) as bars:
        bars.update("fpb", 3, 10, "loss 0.5")
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

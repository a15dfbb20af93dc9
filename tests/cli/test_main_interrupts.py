"""Ctrl-C, a closed pipe and an end of file at any point of a verb: our message and exit code."""

from __future__ import annotations

import subprocess
import sys

import pytest

from finlora.cli.main import main

IN_IMPORT = """
import sys
class CtrlC:
    def find_spec(self, name, *_):
        if name == "rich.console":
            raise KeyboardInterrupt
sys.meta_path.insert(0, CtrlC())
import finlora.cli.main
"""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "Stopped by SIGINT: unwritten work is lost."),
        (EOFError("Ran out of input"), 1, "unexpected error: EOFError: Ran out of input"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
    ],
)
def test_what_typer_would_end_without_a_word_is_reported(tmp_path, monkeypatch, capsys, error, code, words):
    def fail(_path):
        raise error

    monkeypatch.setattr("finlora.results.read_results", fail)
    monkeypatch.setattr("finlora.cli.app.leave_output", lambda: None)  # this would redirect the test's output
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # an unexpected error's traceback goes there
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert "Aborted" not in said
    assert words in said
    assert bool(said) == bool(words)


def test_ctrl_c_while_packages_are_read_is_one_line():
    done = subprocess.run(
        [sys.executable, "-c", IN_IMPORT],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stderr) == (130, "Stopped by SIGINT before anything began.\n")

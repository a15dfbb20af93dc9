"""Any error that ends a command becomes one line of advice and an exit code."""

from __future__ import annotations

import errno
import signal
import stat
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from finlora.errors import ConfigError, DatasetError, FinloraError, ResourceError, StoppedError
from finlora.machine.foreign_errors import explain
from finlora.terminal import exit_with


def leave(run):
    with pytest.raises(SystemExit) as stop:
        exit_with(run)
    return stop.value.code


def fail(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/d/x"), ResourceError, "/d/x: no disk space is left"),
        (OSError(errno.EROFS, "Read-only file system", "/d/x"), ConfigError, "/d/x: access is denied (Read-only"),
        (OSError(errno.EMFILE, "Too many open files"), ResourceError, "raise the limit, for example `ulimit -n 65536`"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/d/x"), ConfigError, "/d/x: No such file: give another file"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            ResourceError,
            "no disk space is left (SafetensorError: Error while serializing",
        ),
        (MemoryError(), ResourceError, "memory ran out (MemoryError)"),
        (
            ModuleNotFoundError("No module named 'grpc_reflection'", name="grpc_reflection"),
            ResourceError,
            f"grpc_reflection is not installed beside {sys.executable}: `make setup`",
        ),
    ],
)
def test_known_kind_says_what_to_do(error, kind, words):
    found = explain(error)
    assert type(found) is kind
    assert str(found).startswith(words) or words in str(found)


def test_error_of_a_task_is_the_one_that_was_raised_there():
    class RayTaskError(Exception):
        cause = DatasetError("line 3 is zero")

    assert explain(RayTaskError("66 lines")) is RayTaskError.cause


def test_unknown_error_is_one_line_and_its_traceback_a_private_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert leave(fail(KeyError("two\nlines"))) == 1
    error = capsys.readouterr().err
    (kept,) = tmp_path.iterdir()
    assert error == (
        f"Finlora error: unexpected error: KeyError: 'two\\nlines'. Its traceback is in {kept}: report it with the command "
        "that led to it.\n"
    )
    assert "Traceback (most recent call last)" in kept.read_text()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_traceback_is_shown_where_it_cannot_be_kept(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    found = explain(KeyError("x"))
    assert type(found) is FinloraError
    assert "led to it:\nKeyError: 'x'" in str(found)


def test_interrupted_command_ends_with_130(capsys):
    assert leave(fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.startswith("Stopped by SIGINT: unwritten work is lost. Run the same command again")
    assert leave(fail(StoppedError("stopped", 143))) == 143


def test_reader_that_has_gone_is_no_error(capsys, monkeypatch, tmp_path):
    with (tmp_path / "out").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert leave(fail(BrokenPipeError(errno.EPIPE, "Broken pipe"))) == 128 + signal.SIGPIPE
        print("to nobody", flush=True)  # noqa: T201
    assert Path(tmp_path / "out").read_text() == ""
    assert capsys.readouterr().err == ""

"""Checks of the machine before a command starts: arguments, home, temporary folder, ports."""

from __future__ import annotations

import os
import queue
import shutil
import socket
from pathlib import Path

import pytest

from finlora.errors import ConfigError, ResourceError
from finlora.machine import host


def test_argument_that_is_no_text_is_named():
    host.check_arguments(["ask", "Gewinn stieg um 12 % \u20ac"])
    with pytest.raises(ConfigError, match=r"argument 2 is b'model.base=\\xff', which is not UTF-8: expected text"):
        host.check_arguments(["train", os.fsdecode(b"model.base=\xff")])
    # In the C locale without Python's UTF-8 mode, bytes of valid text become surrogates too.
    with pytest.raises(
        ConfigError, match=r"argument 1 is b'\\xc3\\xbc', which is UTF-8, but this session's locale reads"
    ):
        host.check_arguments([b"\xc3\xbc".decode("ascii", "surrogateescape")])


def test_missing_home_is_reported(monkeypatch):
    monkeypatch.setenv("HOME", "")
    with pytest.raises(ConfigError, match=r"HOME='' is not an absolute path: set HOME"):
        host.check_home()
    monkeypatch.delenv("HOME")
    host.check_home()
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no entry")))
    with pytest.raises(ConfigError, match=r"HOME is not set and the account has no home folder"):
        host.check_home()


def test_path_too_long_for_sockets_is_refused_at_the_byte(tmp_path, monkeypatch):
    """unix(7): 107 bytes; Ray adds 5 + 8 + 26 + 1 and the process's digits, then 21."""
    most = 107 - (
        len("/ray/session_2026-01-01_00-00-00_000000_") + len(str(os.getpid())) + len("/sockets/plasma_store")
    )
    good, long = Path("/tmp/" + "a" * (most - 5)), Path("/tmp/" + "a" * (most - 4))
    try:
        monkeypatch.setenv("RAY_TMPDIR", str(good))
        host.check_ray_temp()
    finally:
        shutil.rmtree(good, ignore_errors=True)
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(
        ResourceError, match=rf"has {most + 1} bytes, too long .*: expected at most {most}\. Set RAY_TMPDIR"
    ):
        host.check_ray_temp()
    assert not long.exists()


def test_output_that_cannot_be_written_is_refused_by_its_option(tmp_path, monkeypatch):
    assert host.require_output("--output ", tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"--output .*file/x: .*file/x cannot be written \(.*file is not a folder\): give"
    ):
        host.require_output("--output ", tmp_path / "file" / "x")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=r"loop cannot be written"):
        host.require_output("--output ", tmp_path / "loop")
    # A folder's mode does not restrict root, who may run the tests.
    monkeypatch.setattr(host, "find_write_problem", lambda folder: None if folder == tmp_path / "own" else "Read-only")
    (tmp_path / "own").mkdir()
    assert host.require_output("--output ", tmp_path / "own") == tmp_path / "own"
    with pytest.raises(ConfigError, match=rf"--file .*own: {tmp_path} cannot be written \(Read-only\)"):
        host.require_output("--file ", tmp_path / "own", is_new=True)

    def closed(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", closed)
    with pytest.raises(ConfigError, match=r"cannot be written \(Permission denied\)"):
        host.require_output("--output ", tmp_path / "x")


@pytest.mark.parametrize(("size", "left"), [("0", None), ("", None), ("00", None), ("20", "20"), ("abc", "abc")])
def test_terminal_of_no_columns_is_forgotten(monkeypatch, size, left):
    monkeypatch.setenv("COLUMNS", size)
    host.drop_empty_size()
    assert os.environ.get("COLUMNS") == left


def test_temporary_folder_that_cannot_be_used_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TMPDIR", "relative")
    with pytest.raises(ConfigError, match=r"TMPDIR='relative' is not an absolute path"):
        host.check_ray_temp()
    monkeypatch.setattr(host, "MAX_SOCKET_PATH", 10_000)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match=r"cannot be used by Ray \(File exists\): set TMPDIR"):
        host.check_ray_temp()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(host, "MIN_TEMP_BYTES", 2**62)
    with pytest.raises(ResourceError, match=r"MiB free, and Ray needs .*: free space, or set TMPDIR"):
        host.check_ray_temp()


@pytest.mark.parametrize("address", ["203.0.113.9", "no-such-name.invalid"])
def test_address_of_another_machine_is_named(address):
    with pytest.raises(
        ResourceError, match=rf"port=8000 at {address} cannot .*: use an address of this machine with --host"
    ):
        host.require_free_port(address, 8000, "port")


def test_privileged_port_is_named(monkeypatch):
    def refuse(*_arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(host.socket.socket, "bind", refuse)
    with pytest.raises(ResourceError, match=r"\(Permission denied\): ports below 1024 need root: use a higher one"):
        host.require_free_port("127.0.0.1", 80, "port")


def test_taken_port_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ResourceError,
            match=rf"port={port} at 127.0.0.1 cannot be opened \(Address already in use\): another program",
        ):
            host.require_free_port("127.0.0.1", port, "port")
        host.require_listener("127.0.0.1", port)
    host.require_free_port("127.0.0.1", port, "port")
    with pytest.raises(ConnectionRefusedError):
        host.require_listener("127.0.0.1", port)


def test_name_server_that_does_not_answer_is_given_up(monkeypatch):
    silent: queue.Queue[list[object]] = queue.Queue()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: silent.get())
    with pytest.raises(TimeoutError, match=r"no name server answers for slow within 0.1 s"):
        host.require_listener("slow", 1, resolve_s=0.1)
    silent.put([])

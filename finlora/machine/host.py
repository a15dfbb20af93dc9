"""What this machine must offer before anything starts on it: a home folder, a temporary folder, free ports. No Ray here."""

from __future__ import annotations

import errno
import os
import queue
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finlora.errors import ConfigError, ResourceError
from finlora.machine.working_dir import resolve_output

MAX_SOCKET_PATH = 107
"""Longest path of a Unix socket in bytes; source: unix(7), sun_path."""
MIN_TEMP_BYTES = 64 * 2**20
"""Least free space of the temporary folder: the logs and sockets of a local Ray."""
_SESSION = "ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
"""The longest path that Ray makes below the temporary folder; source: ray/_private/node.py, `_init_temp`."""


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse an argument whose bytes are no text.

    Raises:
        ConfigError: one is not UTF-8, or the locale cannot read UTF-8.
    """
    for number, argument in enumerate(arguments, start=1):
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raw = argument.encode("utf-8", "surrogateescape")
            try:
                raw.decode()
            except UnicodeDecodeError:
                raise ConfigError(
                    f"argument {number} is {raw[:60]!r}, which is not UTF-8: expected text in UTF-8. Rename the file, or convert "
                    "the text with `iconv -t UTF-8`."
                ) from None
            raise ConfigError(
                f"argument {number} is {raw[:60]!r}, which is UTF-8, but this session's locale reads "
                f"{sys.getfilesystemencoding()} alone: set PYTHONUTF8=1, or LC_ALL=C.UTF-8."
            )


def check_home() -> None:
    """Look whether `~` stands for a folder.

    Raises:
        ConfigError: it does not.
    """
    home = os.environ.get("HOME")
    if home is None:
        try:
            Path.home()
        except RuntimeError:
            raise ConfigError(
                "HOME is not set and the account has no home folder: set HOME to a folder that can be written."
            ) from None
    elif not Path(home).is_absolute():
        raise ConfigError(f"HOME={home!r} is no absolute path: set HOME to a folder that can be written.")


def find_ray_temp() -> Path:
    """Return the folder below which a local Ray puts sockets and logs; source: ray/_common/utils.py."""
    return Path(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp")))


def check_ray_temp() -> None:
    """Look whether a local Ray can put sockets and logs into its temporary folder.

    Raises:
        ResourceError: the path is too long, the folder is not there or cannot be written, or the disk is full.
    """
    folder = find_ray_temp()
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    if not folder.is_absolute():
        raise ConfigError(f"{name}={os.environ[name]!r} is no absolute path: set it to a folder that can be written.")
    longest = len(os.fsencode(folder / _SESSION.format(pid=os.getpid())))
    if longest > MAX_SOCKET_PATH:
        most = MAX_SOCKET_PATH - (longest - len(os.fsencode(folder)))
        raise ResourceError(
            f"{name}={folder} has {len(os.fsencode(folder))} bytes, too long for Ray's sockets below it: expected at most {most}."
            " Set RAY_TMPDIR to a shorter folder, as RAY_TMPDIR=/tmp."
        )
    problem: str | None
    try:
        folder.mkdir(parents=True, exist_ok=True)  # as Ray does
        problem = find_write_problem(folder)
    except OSError as error:
        problem = error.strerror
    if problem:
        raise ResourceError(
            f"the temporary folder {folder} cannot be used by Ray ({problem}): set {name} to a folder that can be written."
        )
    free = shutil.disk_usage(folder).free
    if free < MIN_TEMP_BYTES:
        raise ResourceError(
            f"the temporary folder {folder} has {free / 2**20:.0f} MiB free, and Ray needs {MIN_TEMP_BYTES / 2**20:.0f} for logs "
            f"and sockets: make room, or set {name} to another folder."
        )


def find_write_problem(folder: Path) -> str | None:
    """Return why no file can be made in a folder that is there; None where one can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def find_output_problem(folder: Path) -> str | None:
    """Return why nothing can be written below a folder, which may not be there yet; None where it can."""
    there = folder.expanduser().absolute()
    try:
        while not os.path.lexists(there) and there != there.parent:  # a link that leads nowhere is in the way
            there = there.parent
        if not there.is_dir():
            return f"{there} is no folder"
    except OSError as error:  # a folder above is closed to this account
        return error.strerror or str(error)
    return find_write_problem(there)


def require_output(option: str, path: Path, *, is_new: bool = False) -> Path:
    """Return the absolute path of what a verb writes, after a look whether it can, before anything is computed.

    Args:
        option: what the user typed before it, as `--output `.
        path: a folder that is written into, which may not be there yet.
        is_new: it is written beside its place and moved there whole, so that the folder above it is what must be writable.

    Raises:
        ConfigError: it is relative inside a submitted Ray job, or cannot be written.
    """
    target = resolve_output(option, path)
    folder = target.parent if is_new else target
    if problem := find_output_problem(folder):
        raise ConfigError(
            f"{option}{path}: {folder} cannot be written ({problem}): name another one, or change its owner or mode."
        )
    return target


def require_listener(host: str, port: int, resolve_s: float = 4.0, connect_s: float = 4.0) -> None:
    """Connect once, and hang up. A name server has no deadline, so that it is waited for in a thread.

    Raises:
        OSError: nobody can be reached there within `resolve_s` + `connect_s` seconds; its `strerror` says why.
    """
    answers: queue.Queue[Any] = queue.Queue()

    def resolve() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=resolve, daemon=True).start()
    try:
        found = answers.get(timeout=resolve_s)
    except queue.Empty:
        raise TimeoutError(errno.ETIMEDOUT, f"no name server answers for {host} within {resolve_s:g} s") from None
    if isinstance(found, Exception):
        raise OSError(errno.EHOSTUNREACH, f"the name {host} cannot be resolved") from found
    problem: OSError | None = None
    for family, kind, protocol, _, where in found[:2]:  # the IPv6 and the IPv4 address of one name
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.settimeout(connect_s / min(len(found), 2))
                probe.connect(where)
                return
        except OSError as error:
            problem = error
    if isinstance(problem, TimeoutError):
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {connect_s:g} s") from problem
    assert problem is not None, "a name has an address"
    raise problem


def require_free_port(host: str, port: int, name: str) -> None:
    """Check that this process may listen at an address of this machine.

    Args:
        name: setting that holds the port, as it is shown.

    Raises:
        ResourceError: another program listens there, the port is privileged, or the address is not this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as door:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind(address)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            advice = "use an address of this machine with --host: 127.0.0.1 for itself alone, 0.0.0.0 for all of its networks"
        elif error.errno in (errno.EACCES, errno.EPERM):
            advice = "ports below 1024 need root: use a higher one with --port"
        else:
            advice = "another program listens there: end it, or use another port with --port"
        raise ResourceError(f"{name}={port} at {host} cannot be listened at ({error.strerror}): {advice}.") from error


def drop_empty_size() -> None:
    """Forget a terminal's size of nothing, as a pipe or a container without a terminal exports it: no help or table fits it."""
    for name in ("COLUMNS", "LINES"):
        if os.environ.get(name, "1").strip().strip("0") == "":
            del os.environ[name]


def fill_streams() -> None:
    """Open what was closed before this process began, as by `>&-`: Python has no stream there, and printing is an error."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def soften_output() -> None:
    """Let standard output and error replace characters that their encoding lacks, where Python would end with an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and (stream.encoding or "").lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="replace")

"""Checks of this machine before a command starts: arguments, home and temporary folder, output, ports. No Ray."""

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
"""Least free space of the temporary folder, for the logs and sockets of a local Ray."""
_SESSION = "ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
"""Longest path that Ray makes below the temporary folder; source: ray/_private/node.py, `_init_temp`."""


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse an argument that is not text.

    Raises:
        ConfigError: an argument is not UTF-8, or the locale cannot read UTF-8.
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
    """Check that `~` resolves to a folder.

    Raises:
        ConfigError: there is no home folder, or HOME is relative.
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
        raise ConfigError(f"HOME={home!r} is not an absolute path: set HOME to a folder that can be written.")


def find_ray_temp() -> Path:
    """Return the folder in which a local Ray puts sockets and logs; source: ray/_common/utils.py."""
    return Path(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp")))


def check_ray_temp() -> None:
    """Check that a local Ray can write sockets and logs to its temporary folder.

    Raises:
        ResourceError: the path is too long, the folder cannot be made or written, or the disk is full.
    """
    folder = find_ray_temp()
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    if not folder.is_absolute():
        raise ConfigError(
            f"{name}={os.environ[name]!r} is not an absolute path: set it to a folder that can be written."
        )
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
            f"and sockets: free space, or set {name} to another folder."
        )


def find_write_problem(folder: Path) -> str | None:
    """Return why no file can be made in an existing folder; None if one can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def find_output_problem(folder: Path) -> str | None:
    """Return why nothing can be written to a folder, which may not exist yet; None if it can."""
    there = folder.expanduser().absolute()
    try:
        while not os.path.lexists(there) and there != there.parent:  # a dangling link blocks mkdir
            there = there.parent
        if not there.is_dir():
            return f"{there} is not a folder"
    except OSError as error:  # this account may not enter a parent folder
        return error.strerror or str(error)
    return find_write_problem(there)


def require_space(folder: Path, num_bytes: int, what: str, *, spare_bytes: int = 0) -> None:
    """Check that the disk of an existing folder has room.

    Args:
        what: what takes the bytes, and how it is said, such as `the missing files take`.
        spare_bytes: that must stay free besides.

    Raises:
        ResourceError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes + spare_bytes > free:
        raise ResourceError(
            f"the disk of {folder} has {free / 2**30:.1f} GiB free, and {what} {num_bytes / 2**30:.1f}: free disk space, or "
            "choose another --output."
        )


def require_output(option: str, path: Path, *, is_new: bool = False) -> Path:
    """Return the absolute path of a verb's output, after a check that it can be written.

    Args:
        option: the option as the user typed it, such as `--output `.
        path: the output folder, which may not exist yet.
        is_new: the output is written beside `path` and renamed, so the parent folder must be writable.

    Raises:
        ConfigError: the path is relative inside a submitted Ray job, or cannot be written.
    """
    target = resolve_output(option, path)
    folder = target.parent if is_new else target
    if problem := find_output_problem(folder):
        raise ConfigError(
            f"{option}{path}: {folder} cannot be written ({problem}): give another one, or change its owner or mode."
        )
    return target


def require_listener(host: str, port: int, resolve_s: float = 4.0, connect_s: float = 4.0) -> None:
    """Connect once and close. Resolving a name has no timeout of its own, so it runs in a thread.

    Raises:
        OSError: no connection within `resolve_s` + `connect_s` seconds; its `strerror` says why.
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
    assert problem is not None, "a resolved name has an address"
    raise problem


def require_free_port(host: str, port: int, name: str) -> None:
    """Check that this process may listen at an address of this machine.

    Args:
        name: setting of the port, as errors show it.

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
            advice = (
                "use an address of this machine with --host: 127.0.0.1 for local clients only, 0.0.0.0 for all networks"
            )
        elif error.errno in (errno.EACCES, errno.EPERM):
            advice = "ports below 1024 need root: use a higher one with --port"
        else:
            advice = "another program listens there: end it, or use another port with --port"
        raise ResourceError(f"{name}={port} at {host} cannot be opened ({error.strerror}): {advice}.") from error


def drop_empty_size() -> None:
    """Unset a terminal size of zero, which a pipe or container may export: no help or table fits in it."""
    for name in ("COLUMNS", "LINES"):
        if os.environ.get(name, "1").strip().strip("0") == "":
            del os.environ[name]


def fill_streams() -> None:
    """Open standard streams that were closed before start, as by `>&-`: without them printing is an error."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def soften_output() -> None:
    """Make standard output and error replace characters that their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and (stream.encoding or "").lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="replace")

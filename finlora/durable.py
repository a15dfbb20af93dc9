"""Atomic writes and sealed records: files survive crashes and full disks whole, and a changed bit is detected.

A sealed record carries, under `sha256`, the hash of all its other values. JSON and YAML keep numbers exactly, so a record that is
read back and hashed again gives the same.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

SEAL = "sha256"
_YOUNG_S = 60.0
"""Age after which an unlocked scratch folder belongs to an ended process: its lock is taken a moment after it is made."""


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with its hash as the last key."""
    return {**record, SEAL: _hash(record)}


def unseal(record: Any) -> dict[str, Any]:
    """Return a record without its hash, after comparing it; one without a hash is returned as it is.

    Raises:
        ValueError: it is not a record, or was changed since it was sealed.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it is {type(record).__name__}, expected a record")
    values = dict(record)
    found = values.pop(SEAL, None)
    if found is not None and found != _hash(values):
        raise ValueError(f"it was changed after it was written: its values do not hash to its {SEAL}")
    return values


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: readers, also after a crash or a power cut, find the old one or the new one.

    Raises:
        OSError: as on a full disk; the old file is left.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder of that prefix, and remove it at the end, as those that killed processes left behind.

    Its process holds a lock on it, which the system frees when the process ends.
    """
    for left in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _YOUNG_S and _is_free(left):
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks, where nothing is swept either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def follow_umask(folder: Path) -> None:
    """Set the modes of a folder and of the files in it to those that open() and mkdir() would have given them.

    tempfile makes folders of mode 700 and safetensors (0.8) files of mode 600, whatever the umask is. A server under another
    account could read the JSON of an adapter beside them, and not the weights.
    """
    probe = folder / ".mode"
    probe.mkdir()  # os.umask() shows the umask only by changing it, for all threads; a new folder shows it as well
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    folder.chmod(mode)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode & 0o666)


def hash_file(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def append_line(path: Path, record: Mapping[str, Any], *, is_synced: bool = False) -> None:
    """Append a sealed record as one JSON line; a line that a crash cut short before it is closed first.

    Args:
        path: made where it is missing.
        record: plain values.
        is_synced: return only when the disk has it.

    Raises:
        OSError: the line did not go in whole, as on a full disk; what went in is taken out again.
    """
    line = (json.dumps(seal(record), ensure_ascii=False) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        num_written = os.write(descriptor, line)
        if num_written != len(line):
            if os.fstat(descriptor).st_size == size + num_written:  # nobody has appended behind it
                os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, f"only {num_written} of {len(line)} bytes were written", str(path))
        if is_synced:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file that were written to their end and not changed; a missing file has none."""
    if not path.is_file():
        return []
    # Not splitlines: it also splits at characters such as U+2028, which JSON strings may hold unescaped.
    return [record for line in path.read_bytes().split(b"\n") if (record := _read_line(line)) is not None]


def read_last_line(path: Path, num_bytes: int = 8192) -> dict[str, Any] | None:
    """Return the last whole record within the last `num_bytes` of a file, however long that is; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - num_bytes))
        lines = stream.read().split(b"\n")
    return next((record for line in reversed(lines) if (record := _read_line(line)) is not None), None)


def try_lock(stream: IO[Any]) -> bool:
    """Lock an open file until it is closed or its process ends; returns whether no other process holds it.

    Some NFS mounts have no locks: there another process is not noticed.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _is_free(folder: Path) -> bool:
    """Return whether no process holds a scratch folder. Raises OSError where the file system has no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _read_line(line: bytes) -> dict[str, Any] | None:
    try:
        return unseal(json.loads(line))
    except ValueError:
        return None


def _hash(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

"""The audit log: who asked which model what, and what came of it, as JSON lines that only grow.

Each line carries the hash of the line before it, so a line that is changed, taken out or put in between breaks the chain from
there on. Lines cut off at the end, or a whole chain written anew, leave a whole chain: so the head, which is the hash of the last
line, is told to the server's log each minute, and `verify_audit` looks for those heads. Texts are left out unless asked
for; their SHA-256 lets someone who holds a text show that it was the one.

Each copy of the server writes a file of its own, named by its start, since two writers cannot share a chain.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finlora.errors import ResultError

_logger = logging.getLogger(__name__)

_GENESIS = "0" * 64
_MAX_LINE_BYTES = 2**26


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditEntry:
    """One question to the model."""

    request_id: str
    key_id: str
    path: str
    model: str
    """As it was asked for."""
    base_hash: str
    """Fingerprint of the base's weights."""
    adapter_hash: str | None
    """None: the base alone."""
    prompt_hash: str
    """SHA-256 of the prompt, in hex."""
    output_hash: str | None
    """SHA-256 of the answer's text; None: there was none."""
    outcome: str
    """Why the answer ended, or the code of the error."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    prompt: str | None = None
    output: str | None = None


def hash_text(text: str) -> str:
    """Return the SHA-256 of a text in hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class AuditLog:
    """Appends entries to a file of its own.

    A crash of the process loses no entry that `append` returned from; a crash of the machine at most those since the last head
    was told.

    Args:
        folder: made where it is missing.
        tell_every_s: seconds between two heads in the server's log.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, tell_every_s: float = 60.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"audit-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}.jsonl"
        self.path = folder / name
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self.head, self.count = _GENESIS, 0
        self._size, self._is_torn = 0, False
        self._tell_every_s, self._told_at, self._told = tell_every_s, time.monotonic(), _GENESIS

    def append(self, entry: AuditEntry) -> None:
        """Write an entry through to the operating system, whole or not at all.

        Raises:
            OSError: the disk is full or gone; the chain stays whole and goes on when it is back.
        """
        values: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        values |= {name: value for name, value in asdict(entry).items() if name not in ("prompt", "output") or value}
        line, head = _seal(values, self.head)
        self._write(f"{line}\n".encode())
        self.head, self.count = head, self.count + 1
        if time.monotonic() >= self._told_at + self._tell_every_s:
            self._tell()

    def close(self) -> None:
        """Tell the last head and close the file; a second time does nothing."""
        if self._descriptor >= 0:
            self._tell()
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, raw: bytes) -> None:
        if self._is_torn:
            os.ftruncate(self._descriptor, self._size)
            self._is_torn = False
        try:
            written = 0
            while written < len(raw):
                written += os.write(self._descriptor, raw[written:])
        except OSError:
            self._is_torn = True
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
                self._is_torn = False
            raise
        self._size += len(raw)

    def _tell(self) -> None:
        self._told_at = time.monotonic()
        if self.head == self._told:
            return
        os.fsync(self._descriptor)
        _logger.warning("The audit log %s has %d entries and ends with %s", self.path, self.count, self.head)
        self._told = self.head


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """What a log holds whose chain is whole."""

    count: int
    head: str
    """Hash of the last entry."""
    has_torn_line: bool
    """Behind the last entry stands the beginning of one: the writer was ended while it wrote, or somebody cut there."""
    found: frozenset[str]
    """Those of the heads looked for that are in the chain."""


def list_logs(path: Path) -> list[Path]:
    """Return a log, or all logs of a folder, oldest first.

    Raises:
        ResultError: there is none.
    """
    logs = sorted(path.glob("audit-*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
    if not logs:
        raise ResultError(
            f"{path} holds no audit log: expected audit-*.jsonl, where audit_dir of a served model points."
        )
    return logs


def verify_audit(path: Path, heads: Collection[str] = ()) -> AuditReport:
    """Follow a log's chain.

    Args:
        path: the log.
        heads: hashes to look for, as the server's log told them: one that is missing was cut off or written anew.

    Raises:
        ResultError: a line is changed, missing or damaged; says which.
    """
    head, count, is_torn = _GENESIS, 0, False
    found = set()
    try:
        with path.open("rb") as stream:
            while raw := stream.readline(_MAX_LINE_BYTES):
                if not raw.endswith(b"\n") and not stream.read(1):
                    is_torn = True
                    break
                head = _follow(raw, head, f"{path}, line {count + 1}")
                count += 1
                found |= {head} & set(heads)
    except OSError as error:
        raise ResultError(f"{path} cannot be read ({error}): expected an audit log.") from error
    return AuditReport(count=count, head=head, has_torn_line=is_torn, found=frozenset(found))


def _follow(raw: bytes, head: str, place: str) -> str:
    """Return the hash of a line that follows the one with `head`.

    Raises:
        ResultError: it does not.
    """
    try:
        line = raw.decode("ascii").removesuffix("\n")
        values = json.loads(line)
        previous, _ = values.pop("previous"), values.pop("hash")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ResultError(
            f"{place} is no entry of an audit log ({type(error).__name__}): expected a line of JSON as the server wrote it. "
            "Compare with a copy of the log; what follows that line is not checked."
        ) from error
    expected, digest = _seal(values, head)
    if line != expected:  # the whole line, so that a field that stands twice does not pass either
        what = "was changed" if previous == head else "does not follow the one before it"
        raise ResultError(
            f"{place} {what}: the log was altered there or before. Compare with a copy of the log; what follows that line is "
            "not checked."
        )
    return digest


def _seal(values: dict[str, Any], previous: str) -> tuple[str, str]:
    """Return the line of an entry, and its hash over content and the hash before it."""
    body = {**values, "previous": previous}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**body, "hash": digest}), digest

"""Audit log: who asked which model, and the outcome, as append-only JSON lines in a hash chain.

Each line carries the hash of the previous line, so a changed, removed or inserted line breaks the chain from there on. If lines
are cut off at the end, or the whole file is rewritten, the chain still holds. Therefore the server's own log gets the head,
the hash of the last line, once a minute, and `verify_audit` looks for these heads. Texts are left out unless configured; their
SHA-256 lets someone who has a text prove that it is the one.

Each process writes its own file, named by its start time, because two writers cannot share a chain.
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
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finlora.errors import ResultError

_logger = logging.getLogger(__name__)

_GENESIS = "0" * 64
_MAX_LINE_BYTES = 2**26


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditEntry:
    """Line of the audit log: one prompt to the model."""

    request_id: str
    index: int = 0
    """Number of the prompt in its request, from 0."""
    key_id: str
    path: str
    model: str
    """Model name of the request."""
    base_hash: str
    """Fingerprint of the base's weights."""
    adapter_hash: str | None
    """None: the base alone."""
    prompt_hash: str
    """SHA-256 of the prompt, in hex."""
    output_hash: str | None
    """SHA-256 of the answer's text; None: no answer."""
    outcome: str
    """Finish reason of the answer, or the code of the error."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    prompt: str | None = None
    output: str | None = None


def hash_text(text: str) -> str:
    """Return the SHA-256 of a text in hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class AuditLog:
    """Writer of one audit file.

    Once `append` returns, a crash of the process cannot lose the entry. A crash of the machine can lose the entries since
    the last head was logged.

    Args:
        folder: created if missing.
        head_every_s: seconds between two heads in the server's log.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, head_every_s: float = 60.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"audit-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}.jsonl"
        self.path = folder / name
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self.head, self.count = _GENESIS, 0
        self._size, self._is_torn = 0, False
        self._head_every_s, self._logged_at, self._logged = head_every_s, time.monotonic(), _GENESIS

    def append(self, entry: AuditEntry) -> None:
        """Pass an entry to the operating system, completely or not at all.

        Raises:
            OSError: the disk is full or gone. The chain stays intact and continues when the disk is back.
        """
        values: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        values |= {name: value for name, value in asdict(entry).items() if name not in ("prompt", "output") or value}
        line, head = _seal(values, self.head)
        self._write(f"{line}\n".encode())
        self.head, self.count = head, self.count + 1
        if time.monotonic() >= self._logged_at + self._head_every_s:
            self._log_head()

    def close(self) -> None:
        """Log the last head and close the file. A second call does nothing."""
        if self._descriptor >= 0:
            self._log_head()
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

    def _log_head(self) -> None:
        self._logged_at = time.monotonic()
        if self.head == self._logged:
            return
        os.fsync(self._descriptor)
        _logger.warning("The audit log %s has %d entries and ends with %s", self.path, self.count, self.head)
        self._logged = self.head


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """Contents of an audit file whose chain is intact."""

    count: int
    head: str
    """Hash of the last entry."""
    has_torn_line: bool
    """Whether the last line is incomplete: the writer was killed while it wrote, or the file was cut there."""
    found: frozenset[str]
    """Wanted heads that are in the chain."""


def list_logs(path: Path) -> list[Path]:
    """Return the audit files at a path, a file or a folder, oldest first.

    Raises:
        ResultError: there is no audit file.
    """
    logs = sorted(path.glob("audit-*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
    if not logs:
        raise ResultError(
            f"{path} holds no audit log: expected audit-*.jsonl, where audit_dir of a served model points."
        )
    return logs


def verify_audit(path: Path, heads: Collection[str] = ()) -> AuditReport:
    """Check the hash chain of an audit file.

    Args:
        path: the audit file.
        heads: hashes from the server's log to look for. If one is missing, lines were cut off or the file was rewritten.

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


def find_entries(path: Path, request_ids: Collection[str]) -> dict[str, list[AuditEntry]]:
    """Return the entries of some requests in an audit file, in the file's order, after checking the chain of the whole file.

    Args:
        path: the audit file.

    Raises:
        ResultError: as `verify_audit`.
    """
    verify_audit(path)
    names = {field.name for field in fields(AuditEntry)}
    found: dict[str, list[AuditEntry]] = {}
    with path.open("rb") as stream:
        while (raw := stream.readline(_MAX_LINE_BYTES)).endswith(b"\n"):
            values = json.loads(raw)
            if values["request_id"] in request_ids:
                entry = AuditEntry(**{name: value for name, value in values.items() if name in names})
                found.setdefault(entry.request_id, []).append(entry)
    return found


def _follow(raw: bytes, head: str, where: str) -> str:
    """Return the hash of the line that follows the line with hash `head`.

    Args:
        where: file and line, for errors.

    Raises:
        ResultError: the line does not follow.
    """
    try:
        line = raw.decode("ascii").removesuffix("\n")
        values = json.loads(line)
        previous, _ = values.pop("previous"), values.pop("hash")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ResultError(
            f"{where} is not an entry of an audit log ({type(error).__name__}): expected a line of JSON as the server wrote it. "
            "Compare with a copy of the log; what follows that line is not checked."
        ) from error
    expected, digest = _seal(values, head)
    if line != expected:  # compare the whole line, so that a duplicate field is found too
        what = "was changed" if previous == head else "does not follow the one before it"
        raise ResultError(
            f"{where} {what}: the log was altered there or before. Compare with a copy of the log; what follows that line is "
            "not checked."
        )
    return digest


def _seal(values: dict[str, Any], previous: str) -> tuple[str, str]:
    """Return the line of an entry, and the hash over its content and the previous hash."""
    body = {**values, "previous": previous}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**body, "hash": digest}), digest

"""The audit log: who asked which model what, and what came of it, as JSON lines that only grow.

Each line carries the hash of the line before it, so a line that is changed, taken out or put in between breaks the chain from
there on. Lines cut off at the end leave a whole chain: compare `head` with the one that the server's log names. Texts are left
out unless asked for; their SHA-256 lets someone who holds a text show that it was the one.

Each copy of the server writes a file of its own, named by its start, since two writers cannot share a chain.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finlora.errors import ResultError

_GENESIS = "0" * 64


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

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"audit-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}.jsonl"
        self.path = folder / name
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._stream = os.fdopen(descriptor, "w", encoding="utf-8")
        self.head = _GENESIS

    def append(self, entry: AuditEntry) -> None:
        """Write an entry through to the operating system.

        Raises:
            OSError: the disk is full or gone.
        """
        values: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        values |= {name: value for name, value in asdict(entry).items() if name not in ("prompt", "output") or value}
        line, self.head = _seal(values, self.head)
        self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


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


def verify_audit(path: Path) -> tuple[int, str]:
    """Follow a log's chain; returns its number of entries and the hash of the last.

    Raises:
        ResultError: a line is changed, missing or damaged; says which.
    """
    head, count = _GENESIS, 0
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"{path} cannot be read ({error}): expected an audit log.") from error
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            found = (values.pop("previous"), values.pop("hash"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultError(f"{path}, line {number} is no entry of an audit log ({error!r}).") from error
        _, expected = _seal(values, head)
        if found != (head, expected):
            what = "was changed" if found[0] == head else "does not follow the one before it"
            raise ResultError(f"{path}, line {number} {what}: the log was altered there or before.")
        head, count = expected, number
    return count, head


def _seal(values: dict[str, Any], previous: str) -> tuple[str, str]:
    """Return the line of an entry, and its hash over content and the hash before it."""
    body = {**values, "previous": previous}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**body, "hash": digest}), digest

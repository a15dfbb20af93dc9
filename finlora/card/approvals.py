"""Approvals of an adapter: decisions of named people as JSON lines in a hash chain, bound to the adapter's files.

`approvals.jsonl` lies in the adapter's folder and moves with it. The contract does not list it, so an approval changes no hash.
Each entry holds the hash of the entry before it: a changed, removed or inserted line breaks the chain from there on. A file that
is rewritten as a whole, or cut at its end, still has an intact chain; so `finlora approve` prints the hash of each new entry, to
be kept elsewhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from finlora.durable import append_line, hash_file, unseal
from finlora.errors import AdapterError, ConfigError
from finlora.model.adapter_files import check_file, hash_weights_and_settings
from finlora.model.contract import CONTRACT_FILE, read_contract

APPROVALS_FILE = "approvals.jsonl"
Decision = Literal["approved", "rejected"]
_GENESIS = "0" * 64
_MAX_BYTES = 2**22
_MAX_TEXT = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Approval:
    """Entry of the chain."""

    time: str
    """UTC, ISO 8601."""
    by: str
    """Name of who decided, as given: FinLoRA does not check who types it."""
    decision: Decision
    note: str
    adapter_hash: str
    """SHA-256 over weights and adapter_config.json; the first 16 digits are the hash that a server shows."""
    contract_hash: str
    """SHA-256 of finlora.yaml, which lists the hashes of all files."""
    card_hash: str | None
    """SHA-256 of the document that the decision rests on. None: none was named."""
    previous: str
    """Hash of the entry before; zeros: this is the first."""
    hash: str
    """SHA-256 over all other values, 64 hex digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterHashes:
    """What an approval is bound to."""

    adapter_hash: str
    contract_hash: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ApprovalState:
    """Entries of an adapter, and what they mean for its files as they are now."""

    bound: AdapterHashes
    """Of the files as they are now."""
    entries: tuple[Approval, ...]
    refusal: str | None
    """Why the adapter does not count as approved; None: it does."""

    @property
    def is_approved(self) -> bool:
        return self.refusal is None


def hash_bound_files(folder: Path) -> AdapterHashes:
    """Return the hashes that an approval is bound to.

    Raises:
        AdapterError: a file is missing.
    """
    check_file(folder / CONTRACT_FILE, _MAX_BYTES)
    return AdapterHashes(
        adapter_hash=hash_weights_and_settings(folder), contract_hash=hash_file(folder / CONTRACT_FILE)
    )


def add_approval(folder: Path, *, by: str, decision: Decision, note: str = "", card: Path | None = None) -> Approval:
    """Append a decision about an adapter as it is now, and return the entry.

    Args:
        card: document that the decision rests on, such as a card.html; its hash goes into the entry.

    Raises:
        AdapterError: the adapter is incomplete or was changed, or the chain so far is broken.
        ConfigError: the name is empty, a text is no line, the card is missing, or the folder cannot be written.
    """
    for name, text in (("--by", by), ("--note", note)):
        if len(text) > _MAX_TEXT or not text.isprintable():
            raise ConfigError(f"{name} has {len(text):,} characters: expected one line of at most {_MAX_TEXT:,}.")
    if not by.strip():
        raise ConfigError("--by is empty: expected the name of who decides.")
    read_contract(folder).check_files(folder)
    bound = hash_bound_files(folder)
    try:
        card_hash = hash_file(card) if card else None
    except OSError as error:
        raise ConfigError(f"--card {card} cannot be read ({error.strerror}): give the file that was read.") from error
    path = folder / APPROVALS_FILE
    read_approvals(folder)  # also refuses a link to a file elsewhere
    try:
        with _locked(path):
            entries = _read_chain(path)
            values: dict[str, Any] = {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "by": by.strip(),
                "decision": decision,
                "note": note.strip(),
                **asdict(bound),
                "card_hash": card_hash,
                "previous": entries[-1].hash if entries else _GENESIS,
            }
            entry = Approval(**values, hash=_hash(values))
            append_line(path, asdict(entry), is_synced=True)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}): run it where the adapter's folder can be written."
        ) from error
    return entry


def read_approvals(folder: Path) -> tuple[Approval, ...]:
    """Return the entries of an adapter, oldest first; none where nobody has decided.

    Raises:
        AdapterError: a line was changed, removed or inserted; names the first.
    """
    path = folder / APPROVALS_FILE
    if not os.path.lexists(path):
        return ()
    check_file(path, _MAX_BYTES)
    return _read_chain(path)


def require_heads(folder: Path, entries: Sequence[Approval], heads: Sequence[str]) -> None:
    """Refuse a chain without the entries that are known from elsewhere: a whole new chain, or one cut off at its end.

    Args:
        heads: hashes of entries.

    Raises:
        AdapterError: names the first that is missing.
    """
    there = {entry.hash for entry in entries}
    if missing := [head for head in heads if head.strip().lower() not in there]:
        raise AdapterError(
            f"{folder / APPROVALS_FILE} holds no entry {missing[0]!r}: entries were cut off, or the file was written anew or "
            "is not intact. Restore it from a copy."
        )


def judge_approvals(folder: Path) -> ApprovalState:
    """Return the entries of an adapter and whether its files, as they are now, are approved. The last decision counts.

    Raises:
        AdapterError: the adapter is incomplete. A broken chain is no error here, but a refusal.
    """
    bound = hash_bound_files(folder)
    command = f"`finlora approve {folder} --by NAME --decision approved`"
    try:
        entries = read_approvals(folder)
    except AdapterError as error:
        return ApprovalState(bound=bound, entries=(), refusal=f"its approvals are not intact: {error}")
    if not entries:
        return ApprovalState(
            bound=bound, entries=(), refusal=f"nobody has approved it: have it judged, then run {command}."
        )
    last = entries[-1]
    refusal = None
    if last.decision != "approved":
        # Without the note: a server shows this to whoever asks for the adapter.
        refusal = (
            f"{last.by} rejected it on {last.time[:10]}: it stays out until a later entry approves it ({command})."
        )
    elif last.adapter_hash != bound.adapter_hash:
        refusal = (
            f"its weights or settings have changed since {last.by} approved it: they hash to {bound.adapter_hash[:16]}, approved "
            f"were {last.adapter_hash[:16]}. Put the approved files back, or have the new ones judged, then run {command}."
        )
    elif last.contract_hash != bound.contract_hash:
        refusal = (
            f"its {CONTRACT_FILE} has changed since {last.by} approved it: it hashes to {bound.contract_hash[:16]}, approved was "
            f"{last.contract_hash[:16]}. Put the approved file back, or have the new one judged, then run {command}."
        )
    return ApprovalState(bound=bound, entries=entries, refusal=refusal)


def _read_chain(path: Path) -> tuple[Approval, ...]:
    entries: list[Approval] = []
    head = _GENESIS
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = unseal(json.loads(line))
            entry = Approval(**values)
            texts = [text for name, text in values.items() if name != "card_hash" or text is not None]
            if not all(isinstance(text, str) and text.isprintable() for text in texts):
                raise ValueError("a value is not a text of one line")
            digest = _hash({name: value for name, value in values.items() if name != "hash"})
        except (ValueError, TypeError, RecursionError) as error:
            raise AdapterError(
                f"{where} is not an approval as it was written ({error}). Restore the file from a copy."
            ) from error
        if entry.hash != digest:
            raise AdapterError(
                f"{where} was changed after it was written (entry of {entry.by!r}, {entry.time!r}): its values do not give its "
                "hash. Restore the file from a copy."
            )
        if entry.previous != head:
            raise AdapterError(
                f"{where} does not follow the line before it: an entry was removed, inserted or replaced there. Restore the file "
                "from a copy."
            )
        head = entry.hash
        entries.append(entry)
    return tuple(entries)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Open the file to append while no other process does."""
    with path.open("ab") as stream:
        with contextlib.suppress(OSError):  # a file system without locks, where two writers can break the chain
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

"""API keys, stored as hashes in a file that `finlora key` writes, or one key in the environment.

A key is `finlora-ID-SECRET` with 256 random bits of secret. So a salted SHA-256 is enough: a slow hash protects only secrets
that can be guessed. The file contains no key, and logs contain only its ID.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from finlora.configfile import settings_from_tree
from finlora.errors import ConfigError
from finlora.yamltext import read_yaml

KEY_VARIABLE = "FINLORA_API_KEY"
ENVIRONMENT_ID = "environment"
_FORM = re.compile(r"finlora-([a-z0-9]{1,32})-([A-Za-z0-9_-]{43})")
_ID = re.compile(r"[a-z0-9]{1,32}")
_HASH = re.compile(r"[0-9a-f]{64}")
_MIN_LENGTH = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRecord:
    """Entry of the key file: what a key may do."""

    id: str = ""
    """Public part of the key, named in logs. Never empty, nor are salt and hash."""
    salt: str = ""
    hash: str = ""
    """SHA-256 of salt and key, in hex."""
    adapters: tuple[str, ...] | None = None
    """Adapters that the key may use; `base` means the base alone. None: all."""
    requests_per_minute: int | None = None
    """None: no limit."""
    tokens_per_minute: int | None = None
    """Prompt and answer tokens together. None: no limit."""
    is_admin: bool = False
    """Whether the key may roll adapters back."""

    def __post_init__(self) -> None:
        checks = [
            (bool(_ID.fullmatch(self.id)), f"id={self.id!r}: expected 1 to 32 small letters and digits"),
            (
                bool(_HASH.fullmatch(self.hash)),
                f"{self.id}.hash has {len(self.hash)} characters: expected 64 hex digits",
            ),
            (self.salt.isascii(), f"{self.id}.salt is not ASCII: expected what `finlora key` wrote"),
            *(
                (value is None or value >= 1, f"{self.id}.{name}={value}: expected at least 1, or null")
                for name, value in (
                    ("requests_per_minute", self.requests_per_minute),
                    ("tokens_per_minute", self.tokens_per_minute),
                )
            ),
        ]
        if faults := [message for is_good, message in checks if not is_good]:
            raise ConfigError(faults)

    def may_use(self, adapter: str | None) -> bool:
        """Return whether the key may ask an adapter, or the base alone (None)."""
        return self.adapters is None or (adapter or "base") in self.adapters


class KeyRing:
    """Keys of a server. The file is read again when it changes, so a key can be revoked without a restart.

    Args:
        file: key file; None: only the environment's key.
        environment: variables, with FINLORA_API_KEY or without.

    Raises:
        ConfigError: there is no key, or the file is damaged.
    """

    def __init__(self, file: Path | None, environment: Mapping[str, str]) -> None:
        self._file = file
        self._stamp: tuple[int, int, int] | None = None
        self._from_file: dict[str, KeyRecord] = {}
        self._own: KeyRecord | None = None
        if plain := environment.get(KEY_VARIABLE):
            if len(plain) < _MIN_LENGTH:
                raise ConfigError(
                    f"{KEY_VARIABLE} has {len(plain)} characters: expected at least {_MIN_LENGTH} that nobody can guess."
                )
            self._own = _make_record(ENVIRONMENT_ID, plain, is_admin=True)
        self._refresh()
        if self._own is None and not self._from_file:
            where = f"{file} holds none" if file else "keys_file is not set"
            raise ConfigError(
                f"there is no API key: {where} and {KEY_VARIABLE} is not set. Make one with `finlora key NAME --file FILE` "
                f"and set keys_file, or set {KEY_VARIABLE}."
            )

    def check(self, key: str) -> KeyRecord | None:
        """Return the record of a key; None if it is unknown. The comparison takes equal time for wrong and right keys."""
        self._refresh()
        match = _FORM.fullmatch(key)
        record = self._from_file.get(match[1]) if match else None
        found = record or self._own or _NOBODY
        is_equal = hmac.compare_digest(_hash(found.salt, key), found.hash)
        return found if is_equal and found is not _NOBODY else None

    def _refresh(self) -> None:
        if self._file is None:
            return
        try:
            stat = self._file.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        except OSError as error:
            raise ConfigError(
                f"the key file {self._file} cannot be read ({error.strerror}): make one with "
                f"`finlora key NAME --file {self._file}`, or name the right one in keys_file."
            ) from error
        if stamp != self._stamp:
            self._from_file = {record.id: record for record in read_keys(self._file)}
            self._stamp = stamp


def read_keys(file: Path) -> list[KeyRecord]:
    """Read a key file.

    Raises:
        ConfigError: it is damaged, holds an id twice, or is readable by others.
    """
    try:
        mode = file.stat().st_mode & 0o077
        tree = read_yaml(file) or []
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"the key file {file} cannot be read ({error}): expected the file of `finlora key`."
        ) from error
    if mode:
        raise ConfigError(f"others than its owner may read or write {file} (mode {mode:03o}): run `chmod 600 {file}`.")
    if not isinstance(tree, list) or not all(isinstance(entry, dict) for entry in tree):
        raise ConfigError(f"{file} does not hold a list of keys: expected the file that `finlora key` writes.")
    records = [settings_from_tree(KeyRecord, entry) for entry in tree]
    ids = [record.id for record in records]
    if doubled := {name for name in ids if ids.count(name) > 1}:
        raise ConfigError(f"{file} holds the id {min(doubled)} more than once: take one out.")
    return records


def add_key(
    file: Path,
    name: str,
    *,
    adapters: tuple[str, ...] | None,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    is_admin: bool,
    show: Callable[[str], None] = lambda key: None,
) -> str:
    """Create a key, append its hash to the file, and return the key, which is stored nowhere.

    Args:
        show: called with the key before the file changes. If it fails, for example on a full disk, the key is not added.

    Raises:
        ConfigError: the name is taken or malformed, or the file is damaged.
    """
    if not _ID.fullmatch(name) or name == ENVIRONMENT_ID:
        raise ConfigError(f"found the name {name!r}: expected 1 to 32 small letters and digits.")
    file = Path(os.path.realpath(file))  # of a link the file that it leads to, which is what a server reads
    if file.is_symlink():
        raise ConfigError(f"{file} is a link that leads to itself: remove it, or name another file.")
    records = read_keys(file) if file.exists() else []
    if any(record.id == name for record in records):
        raise ConfigError(f"{file} holds a key {name!r} already: take another name, or delete its entry first.")
    key = f"finlora-{name}-{secrets.token_urlsafe(32)}"
    record = _make_record(
        name,
        key,
        adapters=adapters,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        is_admin=is_admin,
    )
    entries = [asdict(each) | {"adapters": list(each.adapters) if each.adapters else each.adapters} for each in records]
    entries.append(asdict(record) | {"adapters": list(adapters) if adapters is not None else None})
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            yaml.safe_dump(entries, stream, sort_keys=False)
        show(key)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return key


def _hash(salt: str, key: str) -> str:
    return hashlib.sha256(f"{salt}{key}".encode()).hexdigest()


def _make_record(name: str, key: str, **rights: Any) -> KeyRecord:
    salt = secrets.token_hex(16)
    return KeyRecord(id=name, salt=salt, hash=_hash(salt, key), **rights)


_NOBODY = _make_record("nobody", secrets.token_hex(32))

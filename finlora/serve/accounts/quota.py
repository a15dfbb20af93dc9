"""Quotas of keys: sliding windows of a minute for requests and tokens. No I/O; the clock is an argument."""

from __future__ import annotations

import bisect
import math
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from finlora.errors import QuotaError
from finlora.serve.accounts.keys import KeyRecord

_WINDOW_S = 60.0
_MERGED_S = 0.5
"""Seconds whose counts are one entry, which bounds the entries of a window."""


class Standing(NamedTuple):
    """What a key may still use of one limit."""

    limit: int
    left: int
    reset_s: float
    """Seconds until nothing of the limit is used."""


Standings = dict[str, Standing]
"""`requests` and `tokens` -> standing, for each limit that the key has."""


class KeptQuota(Protocol):
    """Counter of the keys' requests and tokens, in this process or in the one that counts for several."""

    async def admit(self, key: KeyRecord) -> Standings:
        """Count a request and return what is left, or raise QuotaError."""

    def take_tokens(self, key: KeyRecord, count: int) -> None:
        """Count computed tokens."""


class _Entry(NamedTuple):
    last: float
    first: float
    amount: int


class Quota:
    """Windows of all keys: in no 60 s does a key get more than its limit of a minute. Thread-safe.

    Args:
        clock: returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._windows: dict[tuple[str, str], list[_Entry]] = {}
        self._lock = threading.Lock()

    async def admit(self, key: KeyRecord) -> Standings:
        """Same as `take_request`."""
        return self.take_request(key)

    def take_request(self, key: KeyRecord) -> Standings:
        """Count a request.

        Raises:
            QuotaError: the key has used its requests or tokens of the last minute.
        """
        with self._lock:
            now = self._clock()
            self._require(key, "tokens", key.tokens_per_minute, now)
            self._require(key, "requests", key.requests_per_minute, now)
            if key.requests_per_minute is not None:
                self._add(key, "requests", now, now, 1)
            return {
                kind: self._stand(key, kind, limit, now)
                for kind, limit in (("requests", key.requests_per_minute), ("tokens", key.tokens_per_minute))
                if limit is not None
            }

    def take_tokens(self, key: KeyRecord, count: int) -> None:
        """Count computed tokens. An excess over the minute's limit is taken from the next minutes."""
        limit = key.tokens_per_minute
        if limit is None:
            return
        with self._lock:
            now = self._clock()
            room = max(0, limit - _sum(self._entries(key, "tokens", now)))
            minute = 0
            while count > 0:
                part = min(count, room)
                if part > 0:
                    self._add(key, "tokens", now, now + minute * _WINDOW_S, part)
                count, room, minute = count - part, limit, minute + 1

    def _require(self, key: KeyRecord, kind: str, limit: int | None, now: float) -> None:
        if limit is None:
            return
        entries = self._entries(key, kind, now)
        excess, free_at = _sum(entries) - limit + 1, now
        if excess <= 0:
            return
        for entry in entries:
            excess, free_at = excess - entry.amount, entry.last + _WINDOW_S
            if excess <= 0:
                break
        wait = max(1, math.ceil(free_at - now))
        raise QuotaError(
            f"Rate limit reached: key {key.id!r} may use {limit:,} {kind} a minute and has used them. Please try again in "
            f"{wait}s.",
            wait,
            kind,
        )

    def _stand(self, key: KeyRecord, kind: str, limit: int, now: float) -> Standing:
        entries = self._entries(key, kind, now)
        reset_s = entries[-1].last + _WINDOW_S - now if entries else 0.0
        return Standing(limit, max(0, limit - _sum(entries)), reset_s)

    def _add(self, key: KeyRecord, kind: str, now: float, at: float, count: int) -> None:
        entries = self._entries(key, kind, now)
        index = bisect.bisect_right(entries, at, key=lambda entry: entry.last)
        if index and at - entries[index - 1].first < _MERGED_S:
            index -= 1
            before = entries.pop(index)
            entries.insert(index, _Entry(at, before.first, before.amount + count))
        else:
            entries.insert(index, _Entry(at, at, count))

    def _entries(self, key: KeyRecord, kind: str, now: float) -> list[_Entry]:
        """Return what counts now, the oldest first."""
        entries = self._windows.setdefault((key.id, kind), [])
        del entries[: bisect.bisect_right(entries, now - _WINDOW_S, key=lambda entry: entry.last)]
        return entries


def _sum(entries: list[_Entry]) -> int:
    return sum(entry.amount for entry in entries)

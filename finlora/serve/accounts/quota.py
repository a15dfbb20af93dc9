"""Quotas of keys: token buckets for requests and tokens a minute. No I/O; the clock is an argument."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from finlora.errors import QuotaError
from finlora.serve.accounts.keys import KeyRecord


class KeptQuota(Protocol):
    """Counter of the keys' requests and tokens, in this process or in the one that counts for several."""

    async def admit(self, key: KeyRecord) -> None:
        """Count a request, or raise QuotaError."""

    def take_tokens(self, key: KeyRecord, count: int) -> None:
        """Count computed tokens."""


@dataclass(slots=True)
class _Bucket:
    level: float
    filled_at: float


class Quota:
    """Buckets of all keys. Each holds at most one minute's limit and refills evenly over a minute. Thread-safe.

    Args:
        clock: returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}
        self._lock = threading.Lock()

    async def admit(self, key: KeyRecord) -> None:
        """Same as `take_request`."""
        self.take_request(key)

    def take_request(self, key: KeyRecord) -> None:
        """Count a request.

        Raises:
            QuotaError: the key has used its requests or tokens of the minute.
        """
        with self._lock:
            self._require(key, "tokens", key.tokens_per_minute, 0)
            self._require(key, "requests", key.requests_per_minute, 1)

    def take_tokens(self, key: KeyRecord, count: int) -> None:
        """Count computed tokens. An excess over the minute's limit is taken from the next minute."""
        with self._lock:
            bucket = self._fill(key, "tokens", key.tokens_per_minute)
            if bucket is not None:
                bucket.level -= count

    def _require(self, key: KeyRecord, kind: str, per_minute: int | None, count: int) -> None:
        bucket = self._fill(key, kind, per_minute)
        if bucket is None or per_minute is None:
            return
        missing = max(count, 1) - bucket.level
        if missing > 0:
            wait = max(1, math.ceil(missing * 60 / per_minute))
            raise QuotaError(
                f"key {key.id!r} may use {per_minute:,} {kind} a minute and has used them: ask again in {wait} s.", wait
            )
        bucket.level -= count

    def _fill(self, key: KeyRecord, kind: str, per_minute: int | None) -> _Bucket | None:
        if per_minute is None:
            return None
        now = self._clock()
        bucket = self._buckets.setdefault((key.id, kind), _Bucket(per_minute, now))
        bucket.level = min(per_minute, bucket.level + (now - bucket.filled_at) * per_minute / 60)
        bucket.filled_at = now
        return bucket

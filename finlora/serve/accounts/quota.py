"""How much a key may ask: requests and tokens a minute, as buckets that fill evenly. Pure, with a clock from outside."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from finlora.errors import QuotaError
from finlora.serve.accounts.keys import KeyRecord


class KeptQuota(Protocol):
    """Where a server counts what keys ask, in this process or in the one that counts for several."""

    async def admit(self, key: KeyRecord) -> None:
        """Count a request, or raise QuotaError."""

    def take_tokens(self, key: KeyRecord, count: int) -> None:
        """Count tokens that were computed."""


@dataclass(slots=True)
class _Bucket:
    level: float
    filled_at: float


class Quota:
    """Buckets of all keys: a minute's worth at most, refilled over a minute. Safe in every thread.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}
        self._lock = threading.Lock()

    async def admit(self, key: KeyRecord) -> None:
        """Do what `take_request` does."""
        self.take_request(key)

    def take_request(self, key: KeyRecord) -> None:
        """Count a request.

        Raises:
            QuotaError: the key has none left, or its tokens are spent.
        """
        with self._lock:
            self._require(key, "tokens", key.tokens_per_minute, 0)
            self._require(key, "requests", key.requests_per_minute, 1)

    def take_tokens(self, key: KeyRecord, count: int) -> None:
        """Count tokens that were computed; what goes beyond the minute's worth is missing from the next one's."""
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

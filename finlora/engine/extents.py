"""Rows of the KV cache: contiguous extents by best fit, kept after their request as prefix cache until the room is needed.

A request gets one extent for all rows that it can need, so it never has to give way once admitted. Rows that two requests
have in common are copied, not shared: a copy of 4,400 rows of 8B takes about a millisecond, computing them a hundred.

Stages work through micro-batches in one order, so rows can be copied, or their extent given to another request, as soon as the
micro-batch that fills or reads them is scheduled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 16
"""Extents start at and hold multiples of so many rows."""


@dataclass(slots=True, eq=False)
class Extent:
    """Rows [start, start + num_rows) of the cache, filled with the beginning of `ids`."""

    start: int
    num_rows: int
    adapter: str | None
    ids: tuple[int, ...]
    """Prompt tokens that its rows hold, or will."""
    num_ready: int = 0
    """Rows of `ids` that are computed by micro-batches scheduled so far."""
    is_held: bool = True
    """A request still uses it."""


class ExtentPool:
    """All rows of the cache.

    Args:
        num_rows: rows of each layer's cache.
        keeps_prefixes: whether the prompts of finished requests stay until their rows are needed.
    """

    def __init__(self, num_rows: int, *, keeps_prefixes: bool = True) -> None:
        self.num_rows = num_rows // BLOCK * BLOCK
        self._keeps_prefixes = keeps_prefixes
        self._free: list[tuple[int, int]] = [(0, self.num_rows)] if self.num_rows else []
        # Insertion order is the order of last use.
        self._extents: dict[int, Extent] = {}

    @property
    def num_held(self) -> int:
        """Rows of requests at work."""
        return sum(extent.num_rows for extent in self._extents.values() if extent.is_held)

    @property
    def num_kept(self) -> int:
        """Rows of prompts that are kept as prefixes."""
        return sum(extent.num_rows for extent in self._extents.values() if not extent.is_held)

    @property
    def num_free(self) -> int:
        """Rows that hold nothing."""
        return sum(size for _, size in self._free)

    def find(self, adapter: str | None, ids: Sequence[int]) -> tuple[Extent | None, int]:
        """Return the extent whose ready rows share the longest beginning with a prompt, and its length.

        At least the prompt's last token is left to be computed, as its logits are wanted.
        """
        best, longest = None, 0
        if not self._keeps_prefixes:
            return best, longest
        for extent in self._extents.values():
            limit = min(extent.num_ready, len(ids) - 1)
            if extent.adapter != adapter or limit <= longest:
                continue
            length = common_length(extent.ids, ids, limit)
            if length > longest:
                best, longest = extent, length
        return best, longest

    def allocate(self, adapter: str | None, ids: Sequence[int], num_rows: int, spare: Extent | None) -> Extent | None:
        """Take rows for a request, dropping the prefixes unused for longest where needed; None where even that is too little.

        Args:
            ids: its prompt.
            num_rows: rows that it can need at most.
            spare: a kept prefix that it will copy from, not to be dropped.
        """
        size = -(-num_rows // BLOCK) * BLOCK
        if not self._could_fit(size, spare):
            return None
        while (start := self._take(size)) is None:
            oldest = next(item for item in self._extents.values() if not item.is_held and item is not spare)
            self._drop(oldest)
        extent = Extent(start, size, adapter, tuple(ids))
        self._extents[start] = extent
        return extent

    def touch(self, extent: Extent) -> None:
        """Count an extent as used just now."""
        self._extents[extent.start] = self._extents.pop(extent.start)

    def release(self, extent: Extent) -> None:
        """Take an extent back from its request; the ready rows of its prompt stay as prefix."""
        extent.is_held = False
        keep = -(-extent.num_ready // BLOCK) * BLOCK if self._keeps_prefixes else 0
        if keep == 0 or self._is_elsewhere(extent):
            self._drop(extent)
            return
        if keep < extent.num_rows:
            self._give(extent.start + keep, extent.num_rows - keep)
            extent.num_rows = keep
        extent.ids = extent.ids[: extent.num_ready]
        self.touch(extent)

    def _is_elsewhere(self, extent: Extent) -> bool:
        """Return whether another extent holds the same rows."""
        size = extent.num_ready
        return any(
            other is not extent
            and other.adapter == extent.adapter
            and other.num_ready >= size
            and other.ids[:size] == extent.ids[:size]
            for other in self._extents.values()
        )

    def forget(self, adapter: str) -> None:
        """Drop the kept prefixes of an adapter."""
        for extent in [item for item in self._extents.values() if item.adapter == adapter and not item.is_held]:
            self._drop(extent)

    def _could_fit(self, size: int, spare: Extent | None) -> bool:
        """Return whether some run of rows is long enough once every droppable prefix is dropped."""
        fixed = sorted((item.start, item.num_rows) for item in self._extents.values() if item.is_held or item is spare)
        place = 0
        for start, num_rows in [*fixed, (self.num_rows, 0)]:
            if start - place >= size:
                return True
            place = start + num_rows
        return False

    def _take(self, size: int) -> int | None:
        fitting = [(room, start) for start, room in self._free if room >= size]
        if not fitting:
            return None
        room, start = min(fitting)
        self._free.remove((start, room))
        if room > size:
            self._free.append((start + size, room - size))
        return start

    def _drop(self, extent: Extent) -> None:
        del self._extents[extent.start]
        self._give(extent.start, extent.num_rows)

    def _give(self, start: int, num_rows: int) -> None:
        """Make rows free, joined with free neighbours."""
        for other in list(self._free):
            if other[0] + other[1] == start or start + num_rows == other[0]:
                self._free.remove(other)
                start, num_rows = min(start, other[0]), num_rows + other[1]
        self._free.append((start, num_rows))


def common_length(left: Sequence[int], right: Sequence[int], limit: int) -> int:
    """Return how many of the first `limit` tokens two sequences have in common."""
    if left[:limit] == right[:limit]:
        return limit
    low, high = 0, limit - 1
    while low < high:  # the longest length at which the beginnings are equal
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle - 1)
    return low

"""Rows of the KV cache: contiguous extents by best fit, kept after their request as prefix cache until the room is needed.

A request gets one extent for all rows that it can need, so it never has to give way once admitted. Rows that two requests
have in common are copied, not shared: a copy of 4,400 rows of 8B takes about a millisecond, computing them a hundred.

Kept prompts, of which there are thousands, are also held in lexicographic order: what shares the longest beginning with a prompt
lies beside its place there. Requests at work are a few dozen, and are looked through.

Stages work through micro-batches in one order, so rows can be copied, or their extent given to another request, as soon as the
micro-batch that fills or reads them is scheduled.
"""

from __future__ import annotations

from bisect import bisect_left, insort
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


class ExtentPool:
    """All rows of the cache.

    Args:
        num_rows: rows of each layer's cache.
        keeps_prefixes: whether the prompts of finished requests stay until their rows are needed.
    """

    def __init__(self, num_rows: int, *, keeps_prefixes: bool = True) -> None:
        self.num_rows = num_rows // BLOCK * BLOCK
        self._keeps_prefixes = keeps_prefixes
        self._free: list[tuple[int, int]] = []
        """(rows, start), in order."""
        self._free_ends: dict[int, int] = {}
        """Of each free run its start by its end."""
        self._free_rows: dict[int, int] = {}
        """Of each free run its rows by its start."""
        if self.num_rows:
            self._give(0, self.num_rows)
        self._held: dict[int, Extent] = {}
        # Insertion order is the order of last use.
        self._kept: dict[int, Extent] = {}
        self._in_order: dict[str | None, list[tuple[tuple[int, ...], int]]] = {}
        """Of each adapter the kept (ids, start)."""

    @property
    def num_held(self) -> int:
        """Rows of requests at work."""
        return sum(extent.num_rows for extent in self._held.values())

    @property
    def num_kept(self) -> int:
        """Rows of prompts that are kept as prefixes."""
        return sum(extent.num_rows for extent in self._kept.values())

    @property
    def num_free(self) -> int:
        """Rows that hold nothing."""
        return sum(self._free_rows.values())

    def find(self, adapter: str | None, ids: Sequence[int]) -> tuple[Extent | None, int]:
        """Return the extent whose ready rows share the longest beginning with a prompt, and its length.

        At least the prompt's last token is left to be computed, as its logits are wanted.
        """
        best, longest = None, 0
        if not self._keeps_prefixes:
            return best, longest
        in_order, prompt = self._in_order.get(adapter, []), tuple(ids)
        place = bisect_left(in_order, (prompt,))
        beside = [self._kept[start] for _, start in in_order[max(0, place - 1) : place + 1]]
        for extent in (*beside, *self._held.values()):
            limit = min(extent.num_ready, len(prompt) - 1)
            # Of hundreds with the same instruction nearly all differ in the token by which they would be longer.
            if limit <= longest or extent.ids[longest] != prompt[longest] or extent.adapter != adapter:
                continue
            length = common_length(extent.ids, prompt, limit)
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
        start = self._take(size)
        if start is None and not self._could_fit(size, spare):
            return None
        while start is None:
            self._drop(next(item for item in self._kept.values() if item is not spare))
            start = self._take(size)
        extent = Extent(start, size, adapter, tuple(ids))
        self._held[start] = extent
        return extent

    def touch(self, extent: Extent) -> None:
        """Count an extent as used just now."""
        if extent.start in self._kept:
            self._kept[extent.start] = self._kept.pop(extent.start)

    def release(self, extent: Extent) -> None:
        """Take an extent back from its request; the ready rows of its prompt stay as prefix."""
        del self._held[extent.start]
        keep = -(-extent.num_ready // BLOCK) * BLOCK if self._keeps_prefixes else 0
        extent.ids = extent.ids[: extent.num_ready]
        if keep == 0 or self._is_elsewhere(extent):
            self._give(extent.start, extent.num_rows)
            return
        if keep < extent.num_rows:
            self._give(extent.start + keep, extent.num_rows - keep)
            extent.num_rows = keep
        self._kept[extent.start] = extent
        insort(self._in_order.setdefault(extent.adapter, []), (extent.ids, extent.start))

    def _is_elsewhere(self, extent: Extent) -> bool:
        """Return whether another extent holds the same rows."""
        size, in_order = extent.num_ready, self._in_order.get(extent.adapter, [])
        place = bisect_left(in_order, (extent.ids,))  # whatever begins with them comes from here on
        if place < len(in_order) and in_order[place][0][:size] == extent.ids:
            return True
        return any(
            other.num_ready >= size
            and other.ids[size - 1] == extent.ids[-1]
            and other.adapter == extent.adapter
            and other.ids[:size] == extent.ids
            for other in self._held.values()
        )

    def forget(self, adapter: str) -> None:
        """Drop the kept prefixes of an adapter."""
        for extent in [item for item in self._kept.values() if item.adapter == adapter]:
            self._drop(extent)

    def _could_fit(self, size: int, spare: Extent | None) -> bool:
        """Return whether some run of rows is long enough once every droppable prefix is dropped."""
        fixed = {item.start: item.num_rows for item in (*self._held.values(), *([spare] if spare else []))}
        place = 0
        for start, num_rows in [*sorted(fixed.items()), (self.num_rows, 0)]:
            if start - place >= size:
                return True
            place = start + num_rows
        return False

    def _take(self, size: int) -> int | None:
        place = bisect_left(self._free, (size, 0))
        if place == len(self._free):
            return None
        room, start = self._free[place]
        self._remove_free(start)
        if room > size:
            self._give(start + size, room - size)
        return start

    def _drop(self, extent: Extent) -> None:
        """Give up a kept prefix."""
        del self._kept[extent.start]
        in_order = self._in_order[extent.adapter]
        del in_order[bisect_left(in_order, (extent.ids, extent.start))]
        self._give(extent.start, extent.num_rows)

    def _give(self, start: int, num_rows: int) -> None:
        """Make rows free, joined with free neighbours."""
        if start + num_rows in self._free_rows:
            num_rows += self._remove_free(start + num_rows)
        if start in self._free_ends:
            start = self._free_ends[start]
            num_rows += self._remove_free(start)
        insort(self._free, (num_rows, start))
        self._free_rows[start], self._free_ends[start + num_rows] = num_rows, start

    def _remove_free(self, start: int) -> int:
        """Take a free run out of the lists; returns its rows."""
        num_rows = self._free_rows.pop(start)
        del self._free_ends[start + num_rows], self._free[bisect_left(self._free, (num_rows, start))]
        return num_rows


def common_length(left: Sequence[int], right: Sequence[int], limit: int) -> int:
    """Return how many of the first `limit` tokens two sequences have in common."""
    if left[:limit] == right[:limit]:
        return limit
    low, high = 0, limit - 1
    while low < high:  # the longest length at which the beginnings are equal
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle - 1)
    return low

"""Rows of the KV cache: contiguous extents by best fit, kept after their request as prefix cache until the room is needed.

A request gets one extent for all rows that it can need, so it is never preempted once admitted. A prefix that
two requests share is copied, not shared: a copy of 4,400 rows of 8B takes about a millisecond, computing them a hundred.

Kept prompts, of which there are thousands, are also held in lexicographic order, where the longest shared prefix is found next to
the insertion point of a prompt. Active requests are a few dozen, and are searched one by one.

All stages compute micro-batches in one order, so rows can be copied, or their extent given to another request, as soon as the
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
    """Rows [start, start + num_rows) of the cache; the first `num_ready` hold `ids`."""

    start: int
    num_rows: int
    adapter: str | None
    ids: tuple[int, ...]
    """Prompt tokens that its rows hold, or will hold."""
    num_ready: int = 0
    """Rows of `ids` that are computed by micro-batches scheduled so far."""


class ExtentPool:
    """All rows of the cache.

    Args:
        num_rows: rows of each layer's cache.
        keeps_prefixes: keep the prompts of finished requests until their rows are needed.
    """

    def __init__(self, num_rows: int, *, keeps_prefixes: bool = True) -> None:
        self.num_rows = num_rows // BLOCK * BLOCK
        self._keeps_prefixes = keeps_prefixes
        self._free: list[tuple[int, int]] = []
        """(rows, start), in order."""
        self._free_ends: dict[int, int] = {}
        """End of each free run -> its start."""
        self._free_rows: dict[int, int] = {}
        """Start of each free run -> its rows."""
        if self.num_rows:
            self._free_run(0, self.num_rows)
        self._held: dict[int, Extent] = {}
        # Insertion order is the order of last use.
        self._kept: dict[int, Extent] = {}
        self._in_order: dict[str | None, list[tuple[tuple[int, ...], int]]] = {}
        """Adapter -> (ids, start) of its kept prompts, sorted."""

    @property
    def num_held(self) -> int:
        """Rows of active requests."""
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
        """Return the extent whose ready rows share the longest prefix with a prompt, and the prefix's length.

        The prefix leaves out at least the prompt's last token, whose logits are needed.
        """
        best, longest = None, 0
        if not self._keeps_prefixes:
            return best, longest
        in_order, prompt = self._in_order.get(adapter, []), tuple(ids)
        index = bisect_left(in_order, (prompt,))
        beside = [self._kept[start] for _, start in in_order[max(0, index - 1) : index + 1]]
        for extent in (*beside, *self._held.values()):
            limit = min(extent.num_ready, len(prompt) - 1)
            # Nearly all of hundreds of prompts with one instruction differ in this token.
            if limit <= longest or extent.ids[longest] != prompt[longest] or extent.adapter != adapter:
                continue
            length = common_length(extent.ids, prompt, limit)
            if length > longest:
                best, longest = extent, length
        return best, longest

    def allocate(self, adapter: str | None, ids: Sequence[int], num_rows: int, spare: Extent | None) -> Extent | None:
        """Allocate rows for a request, dropping the least recently used prefixes if needed; None: that is not enough.

        Args:
            ids: its prompt.
            num_rows: most rows that it can need.
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
        """Free the extent of a finished request; the ready rows of its prompt stay as a prefix."""
        del self._held[extent.start]
        keep = -(-extent.num_ready // BLOCK) * BLOCK if self._keeps_prefixes else 0
        extent.ids = extent.ids[: extent.num_ready]
        if keep == 0 or self._is_elsewhere(extent):
            self._free_run(extent.start, extent.num_rows)
            return
        if keep < extent.num_rows:
            self._free_run(extent.start + keep, extent.num_rows - keep)
            extent.num_rows = keep
        self._kept[extent.start] = extent
        insort(self._in_order.setdefault(extent.adapter, []), (extent.ids, extent.start))

    def _is_elsewhere(self, extent: Extent) -> bool:
        """Return whether another extent holds the same rows."""
        size, in_order = extent.num_ready, self._in_order.get(extent.adapter, [])
        index = bisect_left(in_order, (extent.ids,))  # prompts with this prefix come from here on
        if index < len(in_order) and in_order[index][0][:size] == extent.ids:
            return True
        return any(
            other.num_ready >= size
            and other.ids[size - 1] == extent.ids[-1]
            and other.adapter == extent.adapter
            and other.ids[:size] == extent.ids
            for other in self._held.values()
        )

    def forget_all(self) -> None:
        """Drop all kept prefixes."""
        for extent in list(self._kept.values()):
            self._drop(extent)

    def forget(self, adapter: str) -> None:
        """Drop the kept prefixes of an adapter."""
        for extent in [item for item in self._kept.values() if item.adapter == adapter]:
            self._drop(extent)

    def _could_fit(self, size: int, spare: Extent | None) -> bool:
        """Return whether a run of rows is long enough once every droppable prefix is dropped."""
        fixed = {item.start: item.num_rows for item in (*self._held.values(), *([spare] if spare else []))}
        end = 0
        for start, num_rows in [*sorted(fixed.items()), (self.num_rows, 0)]:
            if start - end >= size:
                return True
            end = start + num_rows
        return False

    def _take(self, size: int) -> int | None:
        index = bisect_left(self._free, (size, 0))
        if index == len(self._free):
            return None
        num_rows, start = self._free[index]
        self._remove_free(start)
        if num_rows > size:
            self._free_run(start + size, num_rows - size)
        return start

    def _drop(self, extent: Extent) -> None:
        """Drop a kept prefix."""
        del self._kept[extent.start]
        in_order = self._in_order[extent.adapter]
        del in_order[bisect_left(in_order, (extent.ids, extent.start))]
        self._free_run(extent.start, extent.num_rows)

    def _free_run(self, start: int, num_rows: int) -> None:
        """Free rows, and merge them with the free runs on either side."""
        if start + num_rows in self._free_rows:
            num_rows += self._remove_free(start + num_rows)
        if start in self._free_ends:
            start = self._free_ends[start]
            num_rows += self._remove_free(start)
        insort(self._free, (num_rows, start))
        self._free_rows[start], self._free_ends[start + num_rows] = num_rows, start

    def _remove_free(self, start: int) -> int:
        """Remove a free run from the lists; returns its rows."""
        num_rows = self._free_rows.pop(start)
        del self._free_ends[start + num_rows], self._free[bisect_left(self._free, (num_rows, start))]
        return num_rows


def common_length(left: Sequence[int], right: Sequence[int], limit: int) -> int:
    """Return how many of the first `limit` tokens two sequences have in common."""
    if left[:limit] == right[:limit]:
        return limit
    low, high = 0, limit - 1
    while low < high:  # the longest equal prefix
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle - 1)
    return low

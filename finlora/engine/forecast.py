"""How long a micro-batch will compute, from those that did. No torch."""

from __future__ import annotations

import statistics
from collections import deque

_KEPT, _NEAR = 32, 5


class Forecast:
    """The median of the last micro-batches that were most alike, so that one that compiled kernels does not count."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=_KEPT)

    def add(self, num_rows: int, seconds: float) -> None:
        """Count a micro-batch that was computed."""
        self._seen.append((num_rows, seconds))

    def tell(self, num_rows: int) -> float:
        """Return the seconds that so many rows will take at least; 0 before the first micro-batch.

        Of larger ones their share is taken, and of smaller ones all: both are rather too little.
        """
        near = sorted(self._seen, key=lambda seen: abs(seen[0] - num_rows))[:_NEAR]
        return statistics.median(seconds * min(1.0, num_rows / rows) for rows, seconds in near) if near else 0.0

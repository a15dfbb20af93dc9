"""How long a micro-batch will compute, from those that did. No torch."""

from __future__ import annotations

_KEPT = 0.9
"""What a micro-batch counts for after the next one."""


class Forecast:
    """A straight line of seconds over rows through the last micro-batches (least squares, weights that fade)."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._squares = self._products = 0.0

    def add(self, num_rows: int, seconds: float) -> None:
        """Count a micro-batch that was computed."""
        news = (1.0, num_rows, seconds, num_rows**2, num_rows * seconds)
        sums = (self._weight, self._rows, self._seconds, self._squares, self._products)
        self._weight, self._rows, self._seconds, self._squares, self._products = (
            _KEPT * old + new for old, new in zip(sums, news, strict=True)
        )

    def tell(self, num_rows: int) -> float:
        """Return the seconds that so many rows will take; 0 before the first micro-batch."""
        if not self._weight:
            return 0.0
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        spread = self._squares / self._weight - mean_rows**2
        common = self._products / self._weight - mean_rows * mean_seconds
        slope = max(0.0, common / spread) if spread > 1e-3 * mean_rows**2 else 0.0
        return max(0.0, mean_seconds + slope * (num_rows - mean_rows))

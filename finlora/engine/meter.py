"""Utilisation of pipeline stages, the bubble beside its theoretical size, and a forecast of a micro-batch's time.

If M micro-batches pass through K stages of equal speed, each stage idles (K - 1) / (M + K - 1) of the time while the pipeline
fills and drains (GPipe, arXiv:1811.06965, section 2.3): that is the bubble. Time without any request is left out. A stage's
seconds are measured where it runs; only durations are compared, so clocks need not agree.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Figures over a period."""

    elapsed: float
    """Seconds, those without any request included."""
    seconds: float
    """Seconds with at least one micro-batch in flight."""
    busy: tuple[float, ...]
    """Share of `seconds` for which each stage computed."""
    load: tuple[float, ...]
    """Share of `elapsed` for which each stage computed."""
    num_passes: int
    """Micro-batches that were collected."""
    num_runs: int
    """Times that work started after an idle period."""
    in_flight: float
    """Mean number of micro-batches in flight over `seconds`."""
    rows_per_second: float
    """Tokens computed, prompt tokens included."""

    @property
    def bubble(self) -> float:
        """Idle share of the stages' time with work; 0 without work."""
        return 1 - sum(self.busy) / len(self.busy) if self.busy and self.seconds else 0.0

    @property
    def formula(self) -> float:
        """(K - 1) / (M + K - 1) with M the mean number of micro-batches of a run."""
        ahead = len(self.busy) - 1
        return ahead / (self.num_passes / max(1, self.num_runs) + ahead) if self.num_passes else 0.0

    def describe(self) -> str:
        """Return the reading as one line of text."""
        if not self.num_passes:
            return "no micro-batch was computed"
        shares = " / ".join(f"{share:.0%}" for share in self.busy)
        words = f"{self.num_passes:,} micro-batches, {self.rows_per_second:,.0f} tokens/s; "
        if len(self.busy) == 1:
            return words + f"computing {shares} of the time"
        return (
            words
            + f"{len(self.busy)} stages busy {shares}, bubble {self.bubble:.1%} where equal stages have {self.formula:.1%}, "
            f"{self.in_flight:.1f} micro-batches in flight"
        )


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums since the meter was made."""

    at: float = 0.0
    """The meter's clock at that time."""
    seconds: float = 0.0
    flight: float = 0.0
    """Micro-batches in flight times seconds."""
    busy: tuple[float, ...] = ()
    num_passes: int = 0
    num_runs: int = 0
    num_rows: int = 0
    num_in_flight: int = 0
    """Micro-batches in flight at that time."""


class BubbleMeter:
    """Sums over each micro-batch's start and end, for any number of readers: each keeps the totals of its last reading."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._first = self._totals = Totals(at=clock())

    def start(self, num_rows: int) -> None:
        """Count a micro-batch that is sent to the first stage."""
        now = self.totals()
        self._totals = dataclasses.replace(
            now,
            num_runs=now.num_runs + (now.num_in_flight == 0),
            num_rows=now.num_rows + num_rows,
            num_in_flight=now.num_in_flight + 1,
        )

    def end(self, stage_seconds: Sequence[float]) -> None:
        """Count a micro-batch that was collected, with the seconds that each stage computed."""
        now = self.totals()
        before = now.busy or (0.0,) * len(stage_seconds)
        self._totals = dataclasses.replace(
            now,
            busy=tuple(sum(pair) for pair in zip(before, stage_seconds, strict=True)),
            num_passes=now.num_passes + 1,
            num_in_flight=now.num_in_flight - 1,
        )

    def totals(self) -> Totals:
        """Return the sums up to now, from which a later `read` can start."""
        clock, totals = self._clock(), self._totals
        passed = clock - totals.at if totals.num_in_flight else 0.0
        self._totals = dataclasses.replace(
            totals, at=clock, seconds=totals.seconds + passed, flight=totals.flight + passed * totals.num_in_flight
        )
        return self._totals

    def read(self, since: Totals | None = None) -> Reading:
        """Return the figures since the given totals of this meter; None: since it was created."""
        now, since = self.totals(), since or self._first
        seconds, elapsed = max(now.seconds - since.seconds, 1e-9), max(now.at - since.at, 1e-9)
        before = since.busy or (0.0,) * len(now.busy)
        computed = [new - old for new, old in zip(now.busy, before, strict=True)]
        return Reading(
            elapsed=now.at - since.at,
            seconds=now.seconds - since.seconds,
            busy=tuple(min(1.0, own / seconds) for own in computed),
            load=tuple(min(1.0, own / elapsed) for own in computed),
            num_passes=now.num_passes - since.num_passes,
            # Work that was in flight at the start is a run of this reading too.
            num_runs=now.num_runs - since.num_runs + (since.num_in_flight > 0),
            in_flight=(now.flight - since.flight) / seconds,
            rows_per_second=(now.num_rows - since.num_rows) / seconds,
        )


_KEPT, _NEAR = 32, 5


class Forecast:
    """Time of a micro-batch: the median of recent ones of similar size, so that one that compiled kernels does not count."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=_KEPT)

    def add(self, num_rows: int, seconds: float) -> None:
        """Record a micro-batch that was computed."""
        self._seen.append((num_rows, seconds))

    def estimate(self, num_rows: int) -> float:
        """Return the least seconds that a micro-batch of `num_rows` takes; 0 before the first one.

        The time of larger ones is scaled down, that of smaller ones is not scaled up: both underestimate.
        """
        near = sorted(self._seen, key=lambda seen: abs(seen[0] - num_rows))[:_NEAR]
        return statistics.median(seconds * min(1.0, num_rows / rows) for rows, seconds in near) if near else 0.0

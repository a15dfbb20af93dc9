"""How much of their time the stages of a pipeline compute, beside what a pipeline of their number can reach at best.

Of K stages of equal speed through which M micro-batches pass one after the other, each idles (K - 1) / (M + K - 1) of the
time while the pipeline fills and drains (GPipe, arXiv:1811.06965, section 2.3): that is the bubble. Time without any request
counts for nothing. A stage's seconds are measured where it runs; only their lengths are compared, so clocks need not agree.
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
    """What happened in a while."""

    elapsed: float
    """Seconds, those without any request included."""
    seconds: float
    """With at least one micro-batch under way."""
    busy: tuple[float, ...]
    """Share of `seconds` that each stage computed."""
    load: tuple[float, ...]
    """Share of `elapsed` that each stage computed: 0 where there was nothing to compute."""
    num_passes: int
    """Micro-batches that came back."""
    num_runs: int
    """How often work began after there was none."""
    in_flight: float
    """Micro-batches under way, in the mean over the seconds."""
    rows_per_second: float
    """Tokens computed, those of prompts included."""

    @property
    def bubble(self) -> float:
        """Share of the stages' time with work that was idle; 0 without work."""
        return 1 - sum(self.busy) / len(self.busy) if self.busy and self.seconds else 0.0

    @property
    def formula(self) -> float:
        """(K - 1) / (M + K - 1) with M the micro-batches of a run, in the mean."""
        ahead = len(self.busy) - 1
        return ahead / (self.num_passes / max(1, self.num_runs) + ahead) if self.num_passes else 0.0

    def describe(self) -> str:
        """Return the reading in a line of words."""
        if not self.num_passes:
            return "no micro-batch was computed"
        shares = " / ".join(f"{share:.0%}" for share in self.busy)
        words = f"{self.num_passes:,} micro-batches, {self.rows_per_second:,.0f} tokens/s; "
        if len(self.busy) == 1:
            return words + f"computing {shares} of the time"
        return (
            words
            + f"{len(self.busy)} stages busy {shares}, bubble {self.bubble:.1%} where equal stages have {self.formula:.1%}, "
            f"{self.in_flight:.1f} micro-batches under way"
        )


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums since the meter was made."""

    at: float = 0.0
    """The meter's clock when they were taken."""
    seconds: float = 0.0
    flight: float = 0.0
    """Micro-batches under way times seconds."""
    busy: tuple[float, ...] = ()
    num_passes: int = 0
    num_runs: int = 0
    num_rows: int = 0
    under_way: int = 0
    """Micro-batches under way now."""


class BubbleMeter:
    """Told of each micro-batch's start and end. Any number of readers: each keeps the totals that its next one begins from."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._first = self._totals = Totals(at=clock())

    def start(self, num_rows: int) -> None:
        """Count a micro-batch that enters the first stage."""
        now = self.totals()
        self._totals = dataclasses.replace(
            now,
            num_runs=now.num_runs + (now.under_way == 0),
            num_rows=now.num_rows + num_rows,
            under_way=now.under_way + 1,
        )

    def end(self, stage_seconds: Sequence[float]) -> None:
        """Count a micro-batch that came back, with the seconds that each stage computed."""
        now = self.totals()
        before = now.busy or (0.0,) * len(stage_seconds)
        self._totals = dataclasses.replace(
            now,
            busy=tuple(sum(pair) for pair in zip(before, stage_seconds, strict=True)),
            num_passes=now.num_passes + 1,
            under_way=now.under_way - 1,
        )

    def totals(self) -> Totals:
        """Return the sums up to now: what a later `read` can begin from."""
        clock, totals = self._clock(), self._totals
        passed = clock - totals.at if totals.under_way else 0.0
        self._totals = dataclasses.replace(
            totals, at=clock, seconds=totals.seconds + passed, flight=totals.flight + passed * totals.under_way
        )
        return self._totals

    def read(self, since: Totals | None = None) -> Reading:
        """Return what happened since some totals of this meter; None: since it was made."""
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
            # Work that was under way already is a run of this reading too.
            num_runs=now.num_runs - since.num_runs + (since.under_way > 0),
            in_flight=(now.flight - since.flight) / seconds,
            rows_per_second=(now.num_rows - since.num_rows) / seconds,
        )


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

"""Work and waiting time of a run, summed over its attempts; each start of its driver is one attempt. No Ray here.

The driver writes `attempts.json` every five seconds, so that a killed attempt counts up to its last record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from finlora.durable import seal, unseal, write_whole
from finlora.train.run.progress import count_step_seconds
from finlora.train.run.run_folder import RunFolder

_SAVE_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of the driver, or several summed."""

    started: str
    """UTC. Empty: not known."""
    seconds: float
    """Work: start of the workers, steps, checkpoints, restarts after a failure."""
    waited: float
    """Wait for GPUs and cores that others hold."""


class AttemptClock:
    """Clock of the current attempt, written to disk beside the earlier ones.

    Args:
        folder: of the run.
        now: monotonic clock in seconds.
    """

    def __init__(self, folder: RunFolder, now: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._now = now
        self._earlier = read_attempts(folder)
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._last = self._saved = now()
        self._seconds = self._waited = 0.0

    def tick(self, *, is_waiting: bool) -> None:
        """Count the time since the last tick; call it about once a second."""
        now = self._now()
        passed, self._last = now - self._last, now
        if is_waiting:
            self._waited += passed
        else:
            self._seconds += passed
        if now - self._saved >= _SAVE_EVERY_S:
            self._saved = now
            self.save()

    def save(self) -> None:
        """Write all attempts. A full disk is not an error here: the next checkpoint reports it."""
        record = {"attempts": [dataclasses.asdict(attempt) for attempt in self.list()]}
        with contextlib.suppress(OSError):
            write_whole(self._folder.attempts, json.dumps(seal(record), indent=1))

    def list(self) -> list[Attempt]:
        """Return every attempt, the current one last."""
        return [*self._earlier, Attempt(started=self._started, seconds=self._seconds, waited=self._waited)]


def read_attempts(folder: RunFolder) -> list[Attempt]:
    """Return the attempts of a run so far.

    A run without a readable record, as an old one, has one attempt: the time of its logged steps.
    """
    try:
        record = unseal(json.loads(folder.attempts.read_text(encoding="utf-8")))
        return [Attempt(**values) for values in record["attempts"]]
    except (OSError, ValueError, KeyError, TypeError):
        seconds = count_step_seconds(folder)
        return [Attempt(started="", seconds=seconds, waited=0.0)] if seconds else []
